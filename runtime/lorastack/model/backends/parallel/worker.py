"""The process of a shard other than 0: does what shard 0 orders, until it is gone.

Started as `python -m` this module with a socket as its standard input and the numbers of another
one and of the store: see `crew`. It says on the first when its weights are there, and why it ends
if it fails.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import torch

from lorastack.kernels.ops import Ops
from lorastack.model.backends.exact import ask_for_exact_sums
from lorastack.model.backends.parallel.backend import join
from lorastack.model.backends.parallel.checkpoint import CheckpointShard
from lorastack.model.backends.parallel.crew import DONE, READY
from lorastack.model.backends.parallel.loras import Borrower
from lorastack.model.backends.parallel.orders import (
    Hold,
    Join,
    Logits,
    MakeKV,
    MoveKV,
    Order,
    Run,
    Setup,
    Stop,
)
from lorastack.model.backends.parallel.sharded import ShardedBackend, load_shard
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.kv import KVCache

_SOCKET = 0


class Worker:
    """A shard's weights, keys and values, and its parts of LoRAs."""

    def __init__(self, connection: Connection, aside: Connection, store: int) -> None:
        """Reads the weights, says so, and joins the other shards when all have."""
        setup = pickle.loads(connection.recv_bytes())
        assert isinstance(setup, Setup)
        torch.set_num_threads(setup.threads)
        if setup.device.type == "cuda":
            torch.cuda.set_device(setup.device)
            ask_for_exact_sums()
        weights = load_shard(CheckpointShard(Checkpoint(setup.folder), setup.shard), setup)
        connection.send_bytes(READY)
        assert isinstance(pickle.loads(connection.recv_bytes()), Join)
        self._group = join(setup, store)
        self._backend = ShardedBackend(setup, weights, Ops(), self._group)
        self._loras = Borrower(setup.shard, setup.dtype, setup.device)
        self._hidden_size = setup.config.shapes.hidden_size
        self._kv: list[KVCache] = []
        self._connection = connection
        self._aside = aside

    @torch.inference_mode()
    def serve(self) -> None:
        """Carries out orders up to the last."""
        while not isinstance(order := pickle.loads(self._connection.recv_bytes()), Stop):
            self._do(order)

    def _do(self, order: Order) -> None:
        backend = self._backend
        match order:
            case Run():
                batch = order.batch
                lora = self._loras.batch(order.uses)
                backend.compute(replace(batch, lora=lora), self._kv[order.kv])
            case MoveKV():
                self._kv[order.kv].move(order.moves)
            case Logits():
                hidden_XH = torch.empty(
                    order.num_rows, self._hidden_size, dtype=backend.dtype, device=backend.device
                )
                lora = self._loras.batch(order.uses)
                self._group.broadcast(hidden_XH)
                backend.logits(hidden_XH, lora)
            case MakeKV():
                self._kv.append(backend.make_kv(order.num_pages, order.page_size))

    def serve_beside(self) -> None:
        """Carries out the orders beside steps, in a thread of its own, and says so of each."""
        while True:
            order = pickle.loads(self._aside.recv_bytes())
            if isinstance(order, Hold):
                self._loras.hold(order, recv_handle(self._aside))
            else:
                self._loras.drop(order)
            self._aside.send_bytes(DONE)


def _end_with_server() -> None:
    """Ends the process when the other end of the socket is closed, whatever else is going on."""
    poll = select.poll()
    poll.register(_SOCKET, 0)  # nothing but its end
    poll.poll()
    os._exit(0)


def _to_the_end(connection: Connection, work: Callable[[], None]) -> None:
    """Ends the process with the work, and says what it failed with."""
    status = 0
    try:
        work()
    except EOFError:
        pass  # the server has gone
    except Exception:
        status = 1
        with suppress(OSError):
            connection.send_bytes(traceback.format_exc().encode())
    os._exit(status)  # the group's threads may wait for shards that are gone


def main() -> None:
    """The server decides when this ends, not whoever signals its group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_server, name="server-watch", daemon=True).start()
    connection, aside = Connection(_SOCKET), Connection(int(sys.argv[1]))
    store = int(sys.argv[2])

    def serve() -> None:
        worker = Worker(connection, aside, store)
        beside = partial(_to_the_end, connection, worker.serve_beside)
        threading.Thread(target=beside, name="beside-steps", daemon=True).start()
        worker.serve()

    _to_the_end(connection, serve)


if __name__ == "__main__":
    main()
