"""How long do 10,000 adapters take to list, and a server to open?

The store is filled in process, as uploads would (equal tensors are stored once). A server then
opens it; its adapters are listed through gRPC, page after page.

    python -m benchmarks.paging.listing
"""

from __future__ import annotations

import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.paging import SERVING
from benchmarks.paging.synthetic import adapter_id, store_folder, write_adapter
from benchmarks.report import report, seconds
from examples.local_server import local_server
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.registry import Registry
from lorastack.client import Client
from lorastack.config import GIB
from lorastack.startup.files import ModelFiles
from lorastack.startup.folder import model_folder


def main(
    adapters: Annotated[int, typer.Option(help="In the store.")] = 10_000,
    repeats: Annotated[int, typer.Option(help="Calls that a timing takes.")] = 5,
) -> None:
    """Measure and print a table and a JSON line."""
    with tempfile.TemporaryDirectory(prefix="lorastack-") as folder:
        store = Path(folder, "store")
        fill(store, Path(folder, "source"), adapters)
        opening = [seconds(lambda: Registry(store, read_only=True)) for _ in range(repeats)]
        options = (str(store), "--device-memory", str(GIB), "--read-only-store")
        with local_server(*options, command=SERVING) as server, Client(server.address) as client:
            assert len(client.list_adapters()) == adapters
            listing = [seconds(client.list_adapters) for _ in range(repeats)]
            page = [seconds(partial(client.list_adapters, "synthetic/00")) for _ in range(repeats)]
    report(
        f"A store of {adapters} adapters",
        [
            {"what": what, "median ms": round(1000 * statistics.median(times), 1)}
            for what, times in (
                ("open the store", opening),
                ("list all", listing),
                ("list the first 1,000", page),
            )
        ],
    )


def fill(store: Path, source: Path, adapters: int) -> None:
    """Adapters of one set of tensors and a config each."""
    base, name = model_folder(None)
    files = ModelFiles(base)
    fingerprint = files.fingerprint()
    validate = Validator(
        shapes=files.config.shapes,
        base_names=(name,),
        base_weight=files.base_weight,
    )
    write_adapter(source, 1, 0)
    config = source / "adapter_config.json"
    fields = json.loads(config.read_text())
    registry = Registry(store)
    for index in range(adapters):
        config.write_text(json.dumps({**fields, "revision": str(index)}))
        store_folder(registry, adapter_id(index), source, validate, base_fingerprint=fingerprint)
    registry.close()


if __name__ == "__main__":
    typer.run(main)
