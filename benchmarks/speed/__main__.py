"""How fast are we end to end, beside the memory's limit and every installed peer?

The default model in bfloat16, two threads everywhere, greedy, past the end token. All engines stay
loaded and take turns, round by round, on the same prompts; the first round warms up. Ours is a
`lorastack serve`, called through gRPC by a client process. The floor is the tokens that a step
could make if it only read its weights and LoRAs at the bandwidth measured just before (of a
matrix-vector product larger than the caches).

    make peers                       # once: llama.cpp, OpenVINO GenAI and PEFT, as many as you like
    python -m benchmarks.speed       # or make bench
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.paging.synthetic import TARGETS, write_adapter
from benchmarks.paging.traffic import background
from benchmarks.peers.process import PEERS
from benchmarks.report import report
from benchmarks.speed.cases import Prompts, all_cases
from benchmarks.speed.chart import chart
from benchmarks.speed.engines import HEADS, installed_peers
from benchmarks.speed.results import AUTO, OFF, bars
from benchmarks.speed.run import Run
from examples.local_server import ADAPTERS, local_server
from lorastack.client import Client
from lorastack.model.config import load_config
from lorastack.model.fetch.default import default_model
from lorastack.model.size import step_nbytes

NUM_LORAS, RANK = 8, 16
OUT = Path(__file__).parents[1] / "results"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="After the one that warms up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every engine.")] = 2,
    peers: Annotated[str, typer.Option(help="Of the installed ones.")] = ",".join(PEERS),
    out: Annotated[Path, typer.Option(help="Folder for speed.json and speed.svg.")] = OUT,
) -> None:
    """Measure, print tables, write JSON and a plot."""
    torch.set_num_threads(threads)
    options = ("--dtype", "bfloat16", "--threads", str(threads))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorastack-")))
        loras = write_loras(scratch)
        wanted = peers.split(",")
        others = stack.enter_context(installed_peers(loras, threads, scratch, wanted))
        server = stack.enter_context(local_server(*options))
        client = stack.enter_context(Client(server.address))
        sender = stack.enter_context(background())
        watcher = stack.enter_context(background(niceness=0))
        adapter_bytes = upload(client, loras)
        cases = all_cases(list(loras))
        run = Run(server.address, sender, watcher, others, Prompts(client))
        for number in range(rounds + 1):
            run.round(cases, number)
        names = {name: peer.name for name, peer in others.items()}
    base = step_nbytes(load_config(default_model(), None).shapes, torch.bfloat16)
    for case in cases:
        if not case.is_prefill:
            run.results.set_floor(
                case.name, len(case.loras), base + sum(adapter_bytes[a] for a in case.adapters)
            )
    publish(run, names, threads, out)


def publish(run: Run, peers: dict[str, str], threads: int, out: Path) -> None:
    """The tables on stdout, everything in speed.json, the first table in speed.svg."""
    title = f"Decoding, bfloat16, {threads} threads, tokens a second (medians)"
    engines = [OFF, AUTO, *peers]
    rows = run.results.table(engines)
    report(title, rows, peers=peers)
    report("Heads on maths, tokens a second", run.results.heads_table())
    reached = bars(run.results, run.gap_ratios())
    report("What it must reach", [bar.row for bar in reached])
    everything = {
        "title": title,
        "peers": peers,
        "results": asdict(run.results),
        "gaps": [asdict(gaps) for gaps in run.gaps],
        "bars": [asdict(bar) for bar in reached],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(everything, indent=1) + "\n")
    (out / "speed.svg").write_text(chart(title, rows, engines))


def write_loras(scratch: Path) -> dict[str, Path]:
    """Random LoRAs on all projections, by id."""
    folders = {f"lora-{seed}": scratch / f"lora-{seed}" for seed in range(NUM_LORAS)}
    for seed, folder in enumerate(folders.values()):
        write_adapter(folder, RANK, seed, tuple(TARGETS))
    return folders


def upload(client: Client, loras: dict[str, Path]) -> dict[str, int]:
    """Bytes of each LoRA on the device. The heads go up too."""
    client.upload(ADAPTERS / HEADS, HEADS)
    for name, folder in loras.items():
        client.upload(folder, name)
    return {name: client.load(name).device_bytes for name in loras}


if __name__ == "__main__":
    typer.run(main)
