"""A peer as a child process, in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.protocol import Done, Job, Load

FOLDER = Path(__file__).parent
PEERS = ("llama_cpp", "openvino", "peft")


class Peer:
    """A loaded peer that waits for work. Idle it uses no processor."""

    def __init__(self, requests: IO[str], replies: IO[str], log: Path, load: Load) -> None:
        self._requests, self._replies, self._log = requests, replies, log
        loaded = self._ask("load", asdict(load))
        self.name: str = loaded["name"]
        self.mixed_loras: bool = loaded["mixed_loras"]

    def generate(self, job: Job) -> Done:
        """Raises RuntimeError if the peer has ended; with its last words."""
        return Done(**self._ask("generate", asdict(job)))

    def _ask(self, op: str, fields: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps({"op": op, **fields}), file=self._requests, flush=True)
        line = self._replies.readline()
        if not line:
            raise RuntimeError(f"a peer ended:\n{self._log.read_text()[-2000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def python_of(key: str) -> Path | None:
    """The interpreter of a peer's environment; None: `make peers` has not made it."""
    python = FOLDER / key / ".venv" / "bin" / "python"
    return python if (python.parent.parent / ".installed").exists() else None


@contextmanager
def peer(key: str, python: Path, load: Load, log: Path) -> Iterator[Peer]:
    """The peer until the block ends. log: gets its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(load.threads)}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [python, "-m", f"{__package__}.{key}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=FOLDER.parents[1],
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Peer(process.stdin, process.stdout, log, load)
        finally:
            process.stdin.close()  # ends it
