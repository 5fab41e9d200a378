"""`lorastack serve` whose copies to the device take as long as a slow bus would need.

    python -m benchmarks.paging.serving STORE --device-memory BYTES --slow-copy

A copy between two parts of RAM takes a millisecond, which hides what paging does to requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lorastack.config import (
    GIB,
    AdapterConfig,
    EngineConfig,
    ModelConfig,
    ServerConfig,
    ServiceConfig,
    share_cores,
)

COPY_SECONDS, COPY_BYTES_A_SECOND = 0.050, 2e9


@dataclass(frozen=True)
class TimedEvent:
    """Happens at a time."""

    time: float

    def done(self) -> bool:
        return time.monotonic() >= self.time


class TimedStream:
    """Its work is done here at once; events tell of it when a device would have."""

    def __init__(self, latency: float, rate: float) -> None:
        """latency: seconds. rate: bytes a second."""
        self._latency, self._rate = latency, rate
        self._busy_until = 0.0

    def run(self, work: Callable[[], object]) -> None:
        nbytes = getattr(work(), "nbytes", 0)
        self._busy_until = max(self._busy_until, time.monotonic()) + nbytes / self._rate

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self) -> TimedEvent:
        return TimedEvent(self._busy_until + self._latency)

    def wait(self, event: object) -> None:
        """Steps are done when they return."""


def main(
    store: Path,
    device_memory: Annotated[int, typer.Option(help="Bytes for adapters on the device.")],
    host_memory: Annotated[int, typer.Option(help="Bytes for adapters on the host.")] = 8 * GIB,
    max_rows: Annotated[int, typer.Option(help="Rows in a batch.")] = 16,
    slow: Annotated[bool, typer.Option("--slow-copy", help="Copy like a slow device.")] = False,
    read_only: Annotated[bool, typer.Option("--read-only-store")] = False,
    pull_root: Annotated[Path | None, typer.Option(help="Pulls from folders under it.")] = None,
    pull_org: Annotated[str, typer.Option(help="Pulls from this organisation of the hub.")] = "",
) -> None:
    """Serve the default model in bfloat16 with two threads."""
    config = ServerConfig(
        model=ModelConfig(dtype="bfloat16", threads=2),
        engine=EngineConfig(kv_memory=GIB, max_rows=max_rows, max_queue=4096),
        adapters=AdapterConfig(
            store=store,
            device_memory=device_memory,
            host_memory=host_memory,
            read_only_store=read_only,
            pull_roots=(pull_root,) if pull_root else (),
            pull_orgs=(pull_org,) if pull_org else (),
        ),
        service=ServiceConfig(port=0),
    )
    share_cores()
    # After share_cores, as `lorastack serve` does.
    from lorastack.adapters.memory.stream import Streams
    from lorastack.service.build import build_server

    steps, views = TimedStream(0.0, math.inf), TimedStream(0.0, math.inf)
    bus = TimedStream(COPY_SECONDS, COPY_BYTES_A_SECOND)
    server = build_server(config, streams=Streams(steps, bus, views) if slow else None)
    raise typer.Exit(server.run(typer.echo))


if __name__ == "__main__":
    typer.run(main)
