"""A shard's process that computes nothing: `python -m` it in place of the worker.

It says that it is ready, and then does what the environment variable SHARD says. What it is told
beside steps is done as soon as it comes, unless it does nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection


def answer(aside: Connection) -> None:
    with suppress(EOFError):
        while aside.recv_bytes():
            aside.send_bytes(b"done")


if __name__ == "__main__":
    server = Connection(0)
    server.recv_bytes()
    aside = Connection(int(sys.argv[1]))
    if os.environ["SHARD"] != "does nothing":
        threading.Thread(target=answer, args=[aside], daemon=True).start()
    match os.environ["SHARD"]:
        case "ends before it is ready":
            raise SystemExit(3)
        case "cannot start":
            server.send_bytes(b"Traceback ...\nMemoryError: too little\n")
        case "fails at the first order":
            server.send_bytes(b"ready")
            server.recv_bytes()
            server.send_bytes(b"Traceback ...\nIndexError: no such row\n")
        case "does nothing":
            server.send_bytes(b"ready")
            while True:
                time.sleep(60)
        case "ends when told":
            server.send_bytes(b"ready")
            server.recv_bytes()
