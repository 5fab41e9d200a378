"""What do drafting and acceptance take of a step?

A server in this process, with clocks around the engine's stages; maths questions with heads-maths,
AUTO, each row replaced when it ends. Milliseconds a step; the share is of everything that
speculation adds to a step beside its nodes' tokens: choosing heads, growing trees, drawing at their
nodes, moving the accepted KV, running heads, learning.

    python -m benchmarks.load.stages
"""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer

from benchmarks.load import traffic
from benchmarks.load.traffic import Mode, Text
from benchmarks.paging.traffic import background
from benchmarks.report import report
from benchmarks.speed.cases import read
from benchmarks.speed.results import AUTO, MATHS
from examples.local_server import ADAPTERS, ADDRESS
from lorastack.client import Client
from lorastack.config import (
    AdapterConfig,
    EngineConfig,
    ModelConfig,
    ServerConfig,
    ServiceConfig,
    share_cores,
)

Clocks = dict[str, float]  # seconds by stage, and "steps"

HEADS = "heads-maths"
# What a step consists of, and the parts of these that speculation adds.
WHOLE = ("schedule", "run", "update", "_publish")
ADDED = ("choose_heads", "draft trees", "accept", "_move_kv", "run heads", "learn")


def main(
    rows: Annotated[str, typer.Option(help="Concurrent rows.")] = "1,8,64",
    each: Annotated[int, typer.Option(help="Requests a row.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Measure and print a table and a JSON line."""
    share_cores()
    from lorastack.service.build import build_server  # after share_cores, as `lorastack serve` does

    clocks: Clocks = defaultdict(float)
    _time_stages(clocks)
    with tempfile.TemporaryDirectory(prefix="lorastack-") as folder:
        config = ServerConfig(
            model=ModelConfig(dtype="bfloat16", threads=threads),
            engine=EngineConfig(max_rows=64),
            adapters=AdapterConfig(store=Path(folder, "store")),
            service=ServiceConfig(port=0),
        )

        def measure(ready: str) -> None:
            match = ADDRESS.search(ready)
            assert match is not None
            counts = [int(count) for count in rows.split(",")]
            try:
                report("Milliseconds a step", _measured(match.group(1), clocks, counts, each))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        build_server(config).run(lambda ready: Thread(target=measure, args=(ready,)).start())


def _measured(address: str, clocks: Clocks, rows: list[int], each: int) -> list[dict[str, object]]:
    """A row of the table a load, the first one's warm-up left out."""
    text, table = Text(MATHS, HEADS, read("maths.jsonl")), []
    with background(niceness=0) as client, Client(address) as uploader:
        uploader.upload(ADAPTERS / HEADS, HEADS)
        uploader.load(HEADS)
        for count in (rows[0], *rows):
            clocks.clear()
            slots = traffic.requests(text, Mode(AUTO), count, each, seed=count)
            client.run(traffic.run, address, slots)
            table.append(_row(count, clocks))
    return table[1:]


def _row(rows: int, clocks: Clocks) -> dict[str, object]:
    steps = clocks["steps"]
    step = sum(clocks[stage] for stage in WHOLE)
    added = {stage.strip("_").replace("_", " "): clocks[stage] for stage in ADDED}
    share = sum(added.values()) / step
    milliseconds = {"step": step, **added}
    shown = {name: f"{1000 * value / steps:.2f}" for name, value in milliseconds.items()}
    return {"rows": rows, **shown, "share": f"{share:.1%}"}


def _time_stages(clocks: Clocks) -> None:
    """Clocks around the functions that do the work."""
    from lorastack.engine import runner
    from lorastack.engine.loop import StepLoop
    from lorastack.engine.proposer import Proposer
    from lorastack.engine.scheduler import Scheduler
    from lorastack.engine.speculator import Speculator
    from lorastack.model.backends import native
    from lorastack.model.backends import torch as plain

    places: list[tuple[Any, str, str]] = [
        (Scheduler, "schedule", "schedule"),
        (Scheduler, "update", "update"),
        (StepLoop, "_publish", "_publish"),
        (runner.Runner, "run", "run"),
        (runner.Runner, "_move_kv", "_move_kv"),
        (runner, "accept_rows", "accept"),
        (native, "accept_trees", "accept"),
        (plain, "accept_trees", "accept"),
        (Proposer, "propose", "run heads"),
        (Speculator, "trees", "draft trees"),
        (Speculator, "choose_heads", "choose_heads"),
        (Speculator, "learn", "learn"),
    ]
    for owner, name, stage in places:
        setattr(owner, name, _timed(getattr(owner, name), stage, clocks))


def _timed(call: Callable[..., Any], stage: str, clocks: Clocks) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        clocks[stage] += time.perf_counter() - began
        clocks["steps"] += stage == "run"
        return result

    return timed


if __name__ == "__main__":
    typer.run(main)
