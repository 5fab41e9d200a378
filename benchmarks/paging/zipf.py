"""What do 1,000 LoRAs behind room for 32 cost, against all of them on the device?

Two servers share a store; the same Zipf(1.0) requests go to them in turn: one has room for every
adapter on its device, the other for 32 there and 300 on its host. Run with and without a copy delay
of 50 ms + bytes at 2 GB/s. Throughput and time to first token, as ratios of the two servers.

    python -m benchmarks.paging.zipf
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.paging import SERVING
from benchmarks.paging.synthetic import adapter_id, device_bytes, ranks, upload
from benchmarks.paging.traffic import (
    Background,
    Call,
    Outcome,
    background,
    first_token_ms,
    send,
)
from benchmarks.report import report
from examples.local_server import local_server
from lorastack.client import Client
from lorastack.client.traffic import percentile
from lorastack.config import GIB

ON_DEVICE, ON_HOST = 32, 300


def main(
    adapters: Annotated[int, typer.Option(help="LoRAs in the store.")] = 1000,
    requests: Annotated[int, typer.Option(help="Requests a round.")] = 192,
    rounds: Annotated[int, typer.Option(help="Rounds a server.")] = 3,
    slots: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a request.")] = 32,
) -> None:
    """Measure and print a table and a JSON line."""
    mean = sum(device_bytes(rank, 2) for rank in ranks(adapters)) // adapters
    small = ("--device-memory", str(ON_DEVICE * mean), "--host-memory", str(ON_HOST * mean))
    large = ("--device-memory", str(8 * GIB))
    with background() as client, tempfile.TemporaryDirectory(prefix="lorastack-") as folder:
        store = Path(folder, "store")
        with (
            local_server(str(store), *large, command=SERVING) as server,
            Client(server.address) as uploader,
        ):
            upload(uploader, 0, ranks(adapters))
        for slow in (False, True):
            compare(client, store, small, large, slow, _workload(
                adapters, requests, rounds, max_new_tokens
            ), slots)  # fmt: skip


def compare(
    client: Background,
    store: Path,
    small: tuple[str, ...],
    large: tuple[str, ...],
    slow: bool,
    workload: list[list[Call]],
    slots: int,
) -> None:
    delay = ("--slow-copy",) if slow else ()
    outcomes: dict[str, list[Outcome]] = {"resident": [], "paged": []}
    rates: dict[str, list[float]] = {"resident": [], "paged": []}
    with (
        local_server(str(store), *large, "--read-only-store", command=SERVING) as resident,
        local_server(str(store), *small, *delay, "--read-only-store", command=SERVING) as paged,
    ):
        with Client(resident.address) as warm:
            for index in {call.lora_id for calls in workload for call in calls}:
                warm.load(index)
        client.run(send, paged.address, workload[0], slots)  # fills its tiers; not counted
        for calls in workload:
            for name, server in (("resident", resident), ("paged", paged)):
                replies = client.run(send, server.address, calls, slots)
                outcomes[name] += replies
                rates[name].append(
                    sum(outcome.tokens for outcome in replies)
                    / max(outcome.ended for outcome in replies)
                )
    report(
        f"{'copy delay 50 ms + 2 GB/s' if slow else 'no copy delay'}: room for {ON_DEVICE} on the "
        f"device, {ON_HOST} on the host",
        [
            {
                "server": name,
                "tokens a second, median round": round(statistics.median(rates[name]), 1),
                "first token ms, median": first_token_ms(replies)["median"],
                "p99": first_token_ms(replies)["p99"],
                "longest adapter wait ms": round(1000 * max(o.adapter_wait for o in replies)),
            }
            for name, replies in outcomes.items()
        ],
        throughput_ratio=round(
            statistics.median(
                paged / resident
                for paged, resident in zip(rates["paged"], rates["resident"], strict=True)
            ),
            3,
        ),
        first_token_p99_ratio=round(
            percentile([o.first_token for o in outcomes["paged"]], 0.99)
            / percentile([o.first_token for o in outcomes["resident"]], 0.99),
            2,
        ),
    )


def _workload(adapters: int, requests: int, rounds: int, max_new_tokens: int) -> list[list[Call]]:
    """Rounds of requests whose adapters follow Zipf(1.0), popularity unrelated to rank."""
    rng = random.Random(1)
    order = list(range(adapters))
    rng.shuffle(order)
    weights = [1 / place for place in range(1, adapters + 1)]
    return [
        [
            Call(lora_id=adapter_id(index), max_new_tokens=max_new_tokens)
            for index in rng.choices(order, weights, k=requests)
        ]
        for _ in range(rounds)
    ]


if __name__ == "__main__":
    typer.run(main)
