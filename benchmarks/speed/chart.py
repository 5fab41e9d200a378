"""Bars as an SVG: a group a case, a bar an engine, each group on its own scale."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

COLOURS = ("#1b6ca8", "#5aa9e6", "#c44536", "#e9a03b", "#6a994e", "#9a8c98")
LEFT, WIDTH, BAR, GAP, TOP = 190, 520, 14, 14, 40


def chart(title: str, rows: Sequence[dict[str, object]], engines: Sequence[str]) -> str:
    """rows: a case in the first column, its floor and engines' numbers (or "-") as text.

    The longest bar of a group is its best engine or its floor, which is a dashed line.
    """
    parts = [text(LEFT, 20, title, size=14)]
    y = TOP
    for row in rows:
        name, *_ = row.values()
        bars = [(engine, number(row[engine])) for engine in engines if number(row[engine])]
        floor = number(row["floor"])
        scale = WIDTH / max([floor, *(value for _, value in bars)])
        parts.append(text(LEFT - 8, y + BAR - 3, str(name), anchor="end"))
        begin = y
        for engine, value in bars:
            colour = COLOURS[list(engines).index(engine) % len(COLOURS)]
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" '
                f'fill="{colour}"/>'
            )
            parts.append(text(LEFT + value * scale + 6, y + BAR - 4, f"{engine} {value:g}"))
            y += BAR
        if floor:
            x = LEFT + floor * scale
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{begin}" y2="{y}" stroke="#333" '
                'stroke-dasharray="3 2"/>'
            )
        y += GAP
    size = f'width="{LEFT + WIDTH + 190}" height="{y}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{background}{"".join(parts)}</svg>\n'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-family="sans-serif" font-size="{size}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def number(shown: object) -> float:
    """0 for a dash."""
    return 0.0 if shown == "-" else float(str(shown))
