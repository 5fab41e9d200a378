"""What benchmarks share: one table and one line of JSON, and a clock."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import typer
from rich.console import Console
from rich.table import Table


def report(title: str, rows: Sequence[dict[str, object]], **summary: object) -> None:
    """rows: one dict a line, the same keys in each. summary: ratios and settings."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console(width=120)
    console.print(table)
    for name, value in summary.items():
        console.print(f"{name}: {value}")
    typer.echo(json.dumps({"title": title, "rows": list(rows), **summary}))


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each call; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(seconds) for name, seconds in times.items()}
