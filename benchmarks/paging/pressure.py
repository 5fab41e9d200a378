"""What happens when twice as many adapters are wanted as fit?

16 equally popular LoRAs on room for 8, Poisson arrivals at 60% of what the same server manages with
8 of them; against those 8 at the same rate. Every copy to the device takes 50 ms + bytes at 2 GB/s.

    python -m benchmarks.paging.pressure
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.paging import SERVING
from benchmarks.paging.synthetic import adapter_id, device_bytes, upload
from benchmarks.paging.traffic import Call, Outcome, background, first_token_ms, send
from benchmarks.report import report
from examples.local_server import local_server
from lorastack.client import Client

RANK, FITTING, WANTED = 16, 8, 16
LOAD = 0.6


def main(
    requests: Annotated[int, typer.Option(help="Requests a round.")] = 150,
    rounds: Annotated[int, typer.Option(help="Rounds a case.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a request.")] = 32,
) -> None:
    """Measure and print a table and a JSON line."""
    room = FITTING * device_bytes(RANK, 2) + 64
    outcomes: dict[int, list[Outcome]] = {FITTING: [], WANTED: []}
    with (
        background() as client,
        tempfile.TemporaryDirectory(prefix="lorastack-") as folder,
        local_server(
            str(Path(folder, "store")), "--device-memory", str(room), "--slow-copy",
            command=SERVING,
        ) as server,
    ):  # fmt: skip
        with Client(server.address) as uploader:
            upload(uploader, 0, [RANK] * WANTED)
        full = [_call(index % FITTING, max_new_tokens) for index in range(requests)]
        client.run(send, server.address, full[: 4 * FITTING], FITTING)
        saturated = client.run(send, server.address, full, 2 * FITTING)
        rate = LOAD * requests / max(outcome.ended for outcome in saturated)
        for seed in range(rounds):
            for wanted in (FITTING, WANTED):
                calls = _arrivals(wanted, requests, rate, max_new_tokens, seed)
                outcomes[wanted] += client.run(send, server.address, calls, requests)
    medians = {
        wanted: statistics.median(outcome.first_token for outcome in replies)
        for wanted, replies in outcomes.items()
    }
    report(
        f"{WANTED} adapters on room for {FITTING}, {rate:.2f} requests a second",
        [
            {
                "adapters": wanted,
                "first token ms, median": first_token_ms(replies)["median"],
                "p99": first_token_ms(replies)["p99"],
                "longest adapter wait ms": round(1000 * max(o.adapter_wait for o in replies)),
            }
            for wanted, replies in outcomes.items()
        ],
        first_token_median_ratio=round(medians[WANTED] / medians[FITTING], 2),
    )


def _call(index: int, max_new_tokens: int, at: float | None = None) -> Call:
    return Call(lora_id=adapter_id(index), max_new_tokens=max_new_tokens, at=at)


def _arrivals(
    adapters: int, requests: int, rate: float, max_new_tokens: int, seed: int
) -> list[Call]:
    """Poisson arrivals at `rate` a second over equally popular adapters."""
    rng = random.Random(seed)
    at = 0.0
    calls = []
    for _ in range(requests):
        at += rng.expovariate(rate)
        calls.append(_call(rng.randrange(adapters), max_new_tokens, at))
    return calls


if __name__ == "__main__":
    typer.run(main)
