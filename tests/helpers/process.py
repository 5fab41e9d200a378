"""The server in a process of its own, forked with everything imported, that can be killed."""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from lorastack.config import ServerConfig
from lorastack.service.build import build_server
from tests.helpers.costs import cheap_drafts

# Children of the fork server start in a blink: they find torch and gRPC imported, and what a
# tokenizer imports when it is loaded.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "lorastack.service.build",
        "tests.helpers.process",
        "transformers.tokenization_utils_tokenizers",
    ]
)


class ServerProcess:
    """`Server.run` in a child process until it is killed. It measures no costs: drafts are cheap.

    max_file_bytes: the system refuses to make the child's files larger, as it would for a quota.
    """

    def __init__(self, config: ServerConfig, *, max_file_bytes: int | None = None) -> None:
        ours, theirs = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_run, args=(config, theirs, max_file_bytes))
        self._process.start()
        theirs.close()
        with ours:
            self.address: str = ours.recv()  # EOFError: it ended before it served

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """kill -9, and waits until it is gone. May be called again."""
        self._process.kill()
        self._process.join()


def _run(config: ServerConfig, address: Connection, max_file_bytes: int | None) -> None:
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    with cheap_drafts():
        server = build_server(config)
    server.run(lambda line: address.send(server.address))
