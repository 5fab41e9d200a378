"""Does AUTO gain where it can and cost nothing where it cannot, at every load?

One server that chooses for itself, OFF and AUTO; beside it, one whose trees have a fixed size
whatever that costs. The default model in bfloat16, two threads, 1 to 64 concurrent rows, each
replaced when it ends; greedy, past the end token. Modes take turns, round by round, on the same
requests; the first round warms up. Tokens a second while all rows run; ratios are medians over
rounds.

    python -m benchmarks.load                       # or make bench-load
    python -m benchmarks.load --maths my.jsonl      # {"prompt": ...} or {"question": ...} a line
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.load import FIXED, traffic
from benchmarks.load.chart import chart
from benchmarks.load.traffic import NO_HEADS, Mode, Text
from benchmarks.paging.traffic import Background, background
from benchmarks.report import report
from benchmarks.speed.cases import PROMPTS
from benchmarks.speed.results import AUTO, MATHS, OFF, Bar, Results, shown
from benchmarks.speed.run import rotated, say
from examples.local_server import ADAPTERS, SERVE, local_server
from lorastack.client import Client

ROWS = (1, 2, 4, 8, 16, 32, 64)
# Of trees, by the number of rows; 0 is OFF. Larger ones lose more and more.
SIZES = {1: (2, 4, 8, 16), 4: (2, 4, 8, 16), 16: (1, 2, 4, 8), 64: (1, 2)}
HEADS = {MATHS: "heads-maths", "chat": "heads-general", "chat, no heads": NO_HEADS}
FLOOR, OF_FIXED = 0.97, 0.98
GAINS = {1: 1.5, 2: 1.3, 4: 1.2}  # on maths
OUT = Path(__file__).parents[1] / "results"
TITLE = "Speculation at every load, bfloat16"

MODES = [Mode(OFF, 0), Mode(AUTO)]
FIXED_MODES = {
    rows: [Mode(f"fixed {size}", size) for size in sizes] for rows, sizes in SIZES.items()
}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="After the one that warms up.")] = 5,
    each: Annotated[int, typer.Option(min=2, help="Requests a row, in each round.")] = 4,
    rows: Annotated[str, typer.Option(help="Concurrent rows.")] = ",".join(map(str, ROWS)),
    texts: Annotated[str, typer.Option(help="Which, by ;.")] = ";".join(HEADS),
    maths: Annotated[Path, typer.Option(help="JSON lines of word problems.")] = PROMPTS
    / "maths.jsonl",
    chat: Annotated[Path, typer.Option(help="JSON lines of chat prompts.")] = PROMPTS
    / "chat.jsonl",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the server.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for load.json and load.svg.")] = OUT,
) -> None:
    """Measure, print tables, write JSON and a plot."""
    counts = [int(count) for count in rows.split(",")]
    files = {MATHS: maths}
    wanted = [Text(name, HEADS[name], _read(files.get(name, chat))) for name in texts.split(";")]
    with ExitStack() as stack:
        client = stack.enter_context(background(niceness=0))
        options = ("--dtype", "bfloat16", "--threads", str(threads), "--max-rows", "64")
        servers = []
        for command in (SERVE, FIXED):
            server = stack.enter_context(local_server(*options, command=command))
            with Client(server.address) as uploader:
                for heads in {text.heads for text in wanted} - {NO_HEADS}:
                    uploader.upload(ADAPTERS / heads, heads)
                    uploader.load(heads)
            servers.append(server.address)
        results = Results()
        for number in range(rounds + 1):
            kept = results if number else Results()
            for text in wanted:
                for count in counts:
                    say(number, case(text.name, count))
                    point(kept, client, servers, text, count, each, number)
            if number:
                save(kept, [text.name for text in wanted], counts, out)
    report(f"{TITLE}, tokens a second (medians)", table(results))
    reached = bars(results, [text.name for text in wanted], counts)
    report("What it must reach", [bar.row for bar in reached])


def point(
    results: Results,
    client: Background,
    servers: list[str],
    text: Text,
    rows: int,
    each: int,
    number: int,
) -> None:
    """One round's rates of one text at one load. servers: the adaptive one, the one of fixed sizes.

    Fixed sizes are measured on maths: there drafting pays most.
    """
    places = {mode: servers[0] for mode in MODES}
    if text.name == MATHS:
        places |= {mode: servers[1] for mode in FIXED_MODES.get(rows, ())}
    by_name = {mode.name: (mode, server) for mode, server in places.items()}
    for name, (mode, server) in rotated(by_name, number).items():
        slots = traffic.requests(text, mode, rows, each, number)
        rate = traffic.steady_rate(client.run(traffic.run, server, slots))
        results.add(case(text.name, rows), name, rate)


def save(results: Results, texts: list[str], rows: list[int], out: Path) -> None:
    """What was measured so far, in load.json, and AUTO over OFF in load.svg."""
    everything = {
        "title": TITLE,
        "results": results.values,
        "bars": [asdict(bar) for bar in bars(results, texts, rows)],
    }
    ratios = {text: [_gain(results, text, count) or 1.0 for count in rows] for text in texts}
    out.mkdir(parents=True, exist_ok=True)
    (out / "load.json").write_text(json.dumps(everything, indent=1) + "\n")
    (out / "load.svg").write_text(chart(f"{TITLE}: AUTO over OFF", rows, ratios, FLOOR))


def table(results: Results) -> list[dict[str, object]]:
    """A row a text and load."""
    modes = dict.fromkeys(mode for measured in results.values.values() for mode in measured)
    rows: list[dict[str, object]] = []
    for name in results.values:
        row: dict[str, object] = {"tokens/s": name}
        row |= {mode: shown(results.median(name, mode), "{:.0f}") for mode in sorted(modes)}
        row["auto/off"] = shown(results.ratio((name, AUTO), (name, OFF)), "{:.2f}")
        rows.append(row)
    return rows


def bars(results: Results, texts: list[str], rows: list[int]) -> list[Bar]:
    """What must be reached at the loads that were measured."""
    reached = []
    for text in texts:
        ratios = {count: _gain(results, text, count) for count in rows}
        least = min((ratio for ratio in ratios.values() if ratio is not None), default=None)
        reached.append(Bar(f"{text}: AUTO over OFF, the least of all loads", least, FLOOR))
        if text == MATHS:
            reached += [
                Bar(f"{text}: AUTO over OFF, {count} rows", ratios[count], target)
                for count, target in GAINS.items()
                if count in ratios
            ]
    if MATHS in texts:
        reached += [
            Bar(f"{MATHS}: AUTO over {best}, {count} rows", ratio, OF_FIXED)
            for count in rows
            if count in SIZES
            for best, ratio in [_of_best(results, case(MATHS, count))]
        ]
    return reached


def _of_best(results: Results, name: str) -> tuple[str, float | None]:
    """The fixed size, OFF among them, of the highest median, and AUTO over it."""
    modes = [mode for mode in results.values[name] if mode != AUTO]
    best = max(modes, key=lambda mode: results.median(name, mode) or 0.0)
    return best, results.ratio((name, AUTO), (name, best))


def _gain(results: Results, text: str, rows: int) -> float | None:
    return results.ratio((case(text, rows), AUTO), (case(text, rows), OFF))


def case(text: str, rows: int) -> str:
    return f"{text}, {rows} rows"


def _read(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line.get("prompt") or line["question"] for line in lines]


if __name__ == "__main__":
    typer.run(main)
