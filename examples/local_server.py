"""`lorastack serve` as a child process on a free port, for demos and benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lorastack.client import Client
from lorastack.v1.adapters_pb2 import Adapter

ADAPTERS = Path(__file__).parent / "adapters"
ADDRESS = re.compile(r" on (\S+:\d+) ")
STOP_SECONDS = 60
SERVE = ("-m", "lorastack.cli.main", "serve", "--port", "0")


@dataclass(frozen=True, slots=True)
class LocalServer:
    """address: host:port; pid: of the server's process; log: its stderr."""

    address: str
    pid: int
    log: Path


@contextmanager
def local_server(
    *options: str,
    command: Sequence[str] = SERVE,
    on_news: Callable[[str], None] = lambda line: None,
) -> Iterator[LocalServer]:
    """Serve with `options` of `lorastack serve` and an empty store until the block ends.

    command: starts another module of the project that serves with the same options. on_news: gets
    each line that the server logs while it starts.

    Leaves nothing behind. Raises RuntimeError with the server's last words if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="lorastack-") as folder:
        log = Path(folder, "server.log")
        environment = {**os.environ, "LORASTACK_STORE": str(Path(folder, "store"))}
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *command, *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        try:
            assert process.stdout is not None
            ready = ADDRESS.search(_first_line(process.stdout, log, on_news))
            if ready is None:
                process.wait(STOP_SECONDS)
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            yield LocalServer(ready.group(1), process.pid, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _first_line(stdout: IO[str], log: Path, on_news: Callable[[str], None]) -> str:
    """The line that says that the server is ready; "" if it ended."""
    num_told = 0
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(stdout.readline)
        while wait([ready], timeout=1.0).not_done:
            lines = log.read_text().splitlines()
            for line in lines[num_told:]:
                on_news(line)
            num_told = len(lines)
        return ready.result()


def upload_examples(client: Client) -> dict[str, Adapter]:
    """Every folder of examples/adapters under its own name."""
    folders = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())
    return {folder.name: client.upload(folder, folder.name) for folder in folders}
