"""`lorastack serve` whose copies to the device take as long as a slow bus would need.

    python -m benchmarks.paging.serving STORE --device-memory BYTES --slow-copy

A copy between two parts of RAM takes a millisecond, which hides what paging does to requests.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from lorastack.adapters.memory.device import DeviceAdapter
    from lorastack.adapters.memory.host import PackedAdapter

COPY_SECONDS, COPY_BYTES_A_SECOND = 0.050, 2e9


def slow_copy(packed: PackedAdapter) -> DeviceAdapter:
    """Takes as long as a device 50 ms away, over a bus of 2 GB/s."""
    from lorastack.adapters.memory.device import DeviceAdapter

    time.sleep(COPY_SECONDS + packed.nbytes / COPY_BYTES_A_SECOND)
    return DeviceAdapter(digest=packed.digest, buffer=packed.buffer, layout=packed.layout)


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
    from lorastack.service.build import build_server  # after share_cores, as `lorastack serve` does

    server = build_server(config, copy=slow_copy if slow else None)
    raise typer.Exit(server.run(typer.echo))


if __name__ == "__main__":
    typer.run(main)
