"""How much CPU does a scrape cost a server? Asks it as a router does, every 50 ms.

The server's own process_cpu_seconds_total counts, less what as long a time without calls took.

    python -m benchmarks.scrape --server 127.0.0.1:50051
"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families

from lorastack.client import DEFAULT_SERVER, Client

SETTLED = 1.1  # seconds: the server keeps its own names' text for one


def main(
    server: Annotated[str, typer.Option(help="HOST:PORT of a server that idles.")] = DEFAULT_SERVER,
    seconds: Annotated[float, typer.Option(help="Of calls, and as long without.")] = 20.0,
    interval: Annotated[float, typer.Option(help="Seconds between two calls.")] = 0.05,
) -> None:
    """Print the milliseconds of the server's CPU that one GetMetrics call takes."""
    with Client(server) as client:
        before = _cpu_seconds(client)
        time.sleep(seconds)
        idle = _cpu_seconds(client) - before
        before, num_calls = _cpu_seconds(client), 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            size = len(client.metrics().body)
            num_calls += 1
            time.sleep(interval)
        busy = _cpu_seconds(client) - before
    cost = 1000 * (busy - idle) / num_calls
    print(f"{cost:.3f} ms of CPU a call ({num_calls} calls, {size} bytes each)")


def _cpu_seconds(client: Client) -> float:
    """Of the server's process, now."""
    time.sleep(SETTLED)
    for family in text_string_to_metric_families(client.metrics().body.decode()):
        for sample in family.samples:
            if sample.name == "process_cpu_seconds_total":
                return sample.value
    raise typer.BadParameter("the server exports no process_cpu_seconds_total")


if __name__ == "__main__":
    typer.run(main)
