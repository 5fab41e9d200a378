"""A shard's process that computes nothing: `python -m` it in place of the worker.

It says that it is ready, and then does what the environment variable SHARD says.
"""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

if __name__ == "__main__":
    server = Connection(0)
    server.recv_bytes()
    match os.environ["SHARD"]:
        case "ends before it is ready":
            raise SystemExit(3)
        case "cannot start":
            server.send_bytes(b"Traceback ...\nMemoryError: too little\n")
        case "fails at the first order":
            server.send_bytes(b"ready")
            server.recv_bytes()
            server.send_bytes(b"Traceback ...\nIndexError: no such row\n")
        case "never ends":
            server.send_bytes(b"ready")
            while True:
                time.sleep(60)
        case "ends when told":
            server.send_bytes(b"ready")
            server.recv_bytes()
