"""Do running rows feel loads, uploads and pulls? Gaps between their tokens with and without.

Four rows decode (two of the base, two with a LoRA) while a process of low priority has 200 cold
adapters loaded, uploads adapters, or has them pulled, from a folder or from a hub on this machine.
Quiet and busy phases take turns.

    python -m benchmarks.paging.stalls
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.paging import SERVING
from benchmarks.paging.synthetic import adapter_id, ranks, scratch_folder, upload, write_adapter
from benchmarks.paging.traffic import Call, background, send
from benchmarks.report import report
from examples.local_server import local_server
from lorastack.client import Client
from lorastack.client.traffic import percentile
from lorastack.config import GIB
from tests.helpers.fake_hub import FakeHub

COLD = 200
RUNNING = ("", "", adapter_id(0), adapter_id(1))


def main(
    max_new_tokens: Annotated[int, typer.Option(help="A running row and phase.")] = 256,
    rounds: Annotated[int, typer.Option(help="Quiet and busy phases.")] = 3,
) -> None:
    """Measure and print a table and a JSON line."""
    calls = [Call(lora_id=lora_id, max_new_tokens=max_new_tokens) for lora_id in RUNNING]
    gaps: dict[str, list[float]] = {phase: [] for phase in _PHASES}
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_free_port()}"  # the server's, and `pull_hub`'s
    with (
        background() as reader,
        background() as other,
        tempfile.TemporaryDirectory(prefix="lorastack-") as folder,
        local_server(
            str(Path(folder, "store")), "--device-memory", str(GIB), "--host-memory", str(GIB),
            "--pull-root", folder, "--pull-org", "synthetic", command=SERVING,
        ) as server,
    ):  # fmt: skip
        with Client(server.address) as client:
            upload(client, 0, ranks(len(RUNNING) + COLD))
        reader.run(send, server.address, calls, len(calls))
        stop = Path(folder, "stop")
        for _ in range(rounds):
            for phase in gaps:
                stop.unlink(missing_ok=True)
                ended = other.start(_PHASES[phase], server.address, folder)
                outcomes = reader.run(send, server.address, calls, len(calls))
                stop.touch()
                ended()
                gaps[phase] += [gap for outcome in outcomes for gap in outcome.gaps]
    quiet = percentile(gaps["quiet"], 0.99)
    report(
        "Gaps between the tokens of four running rows",
        [
            {
                "meanwhile": phase,
                "median ms": round(1000 * percentile(measured, 0.5), 1),
                "p99 ms": round(1000 * percentile(measured, 0.99), 1),
                "longest ms": round(1000 * max(measured), 1),
                "p99 ratio": round(percentile(measured, 0.99) / quiet, 2),
            }
            for phase, measured in gaps.items()
        ],
    )


def load_cold(address: str, folder: str) -> None:
    """Loads cold adapters, and drops each from memory again."""
    with Client(address) as client:
        for index in _until_stopped(folder):
            adapter = adapter_id(len(RUNNING) + index % COLD)
            client.load(adapter)
            client.unload(adapter)


def upload_more(address: str, folder: str) -> None:
    """Uploads adapters that the store does not have."""
    with Client(address) as client:
        for index in _until_stopped(folder):
            with scratch_folder(16, 1_000_000 + index) as source:
                client.upload(source, "synthetic/uploaded")


def pull_more(address: str, folder: str) -> None:
    """Has a folder pulled whose content changes."""
    with Client(address) as client:
        for index in _until_stopped(folder):
            write_adapter(Path(folder, "source"), 16, 2_000_000 + index)
            client.pull("synthetic/pulled", folder=str(Path(folder, "source")))


def pull_hub(address: str, folder: str) -> None:
    """Has a repository pulled whose content changes."""
    port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
    with FakeHub(port=port) as hub, Client(address) as client:
        for index in _until_stopped(folder):
            with scratch_folder(16, 3_000_000 + index) as source:
                hub.add_folder("synthetic/lora", source)
            client.pull("synthetic/pulled", hub_id="synthetic/lora")


def nothing(address: str, folder: str) -> None:
    """The quiet phase."""


def _until_stopped(folder: str) -> Iterator[int]:
    return takewhile(lambda _: not Path(folder, "stop").exists(), count())


_PHASES: dict[str, Callable[[str, str], None]] = {
    "quiet": nothing,
    "loads": load_cold,
    "uploads": upload_more,
    "folder pulls": pull_more,
    "hub pulls": pull_hub,
}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
