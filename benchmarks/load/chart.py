"""AUTO over OFF by the number of rows, a line a text, as an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.speed.chart import COLOURS, text

LEFT, TOP, WIDTH, HEIGHT = 50, 40, 460, 260


def chart(
    title: str, rows: Sequence[int], ratios: Mapping[str, Sequence[float]], floor: float
) -> str:
    """ratios: of each text, one for each number of rows. floor: a dashed line, as is OFF's 1."""
    top = max(max(values) for values in ratios.values()) * 1.05
    bottom = min(floor, *(min(values) for values in ratios.values())) * 0.95

    def x(index: int) -> float:
        return LEFT + WIDTH * index / max(len(rows) - 1, 1)

    def y(ratio: float) -> float:
        return TOP + HEIGHT * (top - ratio) / (top - bottom)

    parts = [text(LEFT, 20, title, size=14)]
    for level, dashes in ((1.0, ""), (floor, ' stroke-dasharray="3 2"')):
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(level):.1f}" y2="{y(level):.1f}" '
            f'stroke="#888"{dashes}/>'
        )
        parts.append(text(LEFT - 6, y(level) + 4, f"{level:g}", anchor="end"))
    for index, count in enumerate(rows):
        parts.append(text(x(index), TOP + HEIGHT + 18, str(count), anchor="middle"))
    parts.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, "concurrent rows", anchor="middle"))
    for (name, values), colour in zip(ratios.items(), COLOURS, strict=False):
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        label = 30 + 16 * list(ratios).index(name)
        parts.append(f'<rect x="{LEFT + 260}" y="{label}" width="10" height="10" fill="{colour}"/>')
        parts.append(text(LEFT + 276, label + 9, name))
        for index, value in enumerate(values):
            parts.append(text(x(index), y(value) - 6, f"{value:.2f}", anchor="middle", size=9))
    size = f'width="{LEFT + WIDTH + 30}" height="{TOP + HEIGHT + 50}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{background}{"".join(parts)}</svg>\n'
