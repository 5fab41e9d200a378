"""One table and one line of JSON for a benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence

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
