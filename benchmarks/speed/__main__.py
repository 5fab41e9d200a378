"""How fast are we end to end, beside the memory's limit and every installed peer?

The default model, greedy, past the end token, the same threads everywhere; ours and each peer in
the kind of numbers that it has kernels for here, which a table names. All engines stay loaded and
take turns, round by round, on the same prompts; a short round before the others warms up. Ours is a
`lorastack serve`, called through gRPC by a client process. The floor is the tokens that a step
could make if it only read its weights and LoRAs, as ours has them, at the bandwidth measured just
before (of a matrix-vector product larger than the caches). A peer that is missing or fails is a
line with its reason. LORASTACK_ISA limits our server, and peers as far as they can be limited.

    make peers                       # once: llama.cpp, OpenVINO GenAI and PEFT, as many as you like
    python -m benchmarks.speed       # or make bench
    python -m benchmarks.speed --only 1,8,loras --peers llama_cpp --rounds 1
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.paging.synthetic import TARGETS, write_adapter
from benchmarks.paging.traffic import background
from benchmarks.peers.process import PEERS, USUAL
from benchmarks.peers.protocol import About
from benchmarks.report import report
from benchmarks.speed.cases import PARTS, Case, Prompts, all_cases
from benchmarks.speed.chart import chart
from benchmarks.speed.engines import HEADS
from benchmarks.speed.latency import Gaps
from benchmarks.speed.peers import Peers, line, loaded_peers
from benchmarks.speed.results import AUTO, OFF, Bar, Results, bars
from benchmarks.speed.run import Run
from examples.local_server import ADAPTERS, local_server
from lorastack.client import Client, GetModelInfoResponse
from lorastack.model.config import load_config
from lorastack.model.fetch.default import default_model
from lorastack.model.size import step_nbytes

LORAS, RANK = [f"lora-{seed}" for seed in range(8)], 16
PARTS_HELP = f"Of {', '.join(PARTS)}; a number: so many rows of the base model."
PEERS_HELP = f"Other engines, of {', '.join(PEERS)}; '': none."
OUT_HELP = "Folder for speed.json and speed.svg; without it benchmarks/results, if all parts ran."
OUT = Path(__file__).parents[1] / "results"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="After the one that warms up.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every engine.")] = 2,
    only: Annotated[str, typer.Option(help=PARTS_HELP)] = ",".join(PARTS),
    peers: Annotated[str, typer.Option(help=PEERS_HELP)] = ",".join(USUAL),
    dtype: Annotated[str, typer.Option(help="Of our server, as in `lorastack serve`.")] = "auto",
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
) -> None:
    """Measure, print tables, write JSON and a plot."""
    parts, wanted = chosen("--only", only, PARTS), chosen("--peers", peers, PEERS)
    torch.set_num_threads(threads)
    cases = [case for case in all_cases(LORAS) if case.key in parts]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorastack-")))
        loras = write_loras(scratch, cases)
        others = stack.enter_context(loaded_peers(wanted, loras, threads, scratch))
        server = stack.enter_context(local_server("--dtype", dtype, "--threads", str(threads)))
        client = stack.enter_context(Client(server.address))
        sender = stack.enter_context(background())
        watcher = stack.enter_context(background(niceness=0))
        info, adapter_bytes = client.model_info(), upload(client, loras)
        run = Run(server.address, sender, watcher, others, Prompts(client))
        run.check()
        for number in range(rounds + 1):
            run.round(cases, parts, number)
    set_floors(run, cases, info, adapter_bytes)
    measured = summary(run, info, others, threads)
    publish(measured)
    if out is not None or len(parts) == len(PARTS):
        write(measured, out or OUT)


def chosen(option: str, given: str, known: Collection[str]) -> list[str]:
    """The names of a list with commas, in the order of `known`."""
    names = {name.strip() for name in given.split(",")} - {""}
    if unknown := sorted(names - set(known)):
        raise typer.BadParameter(f"{option}: no {', '.join(unknown)} among {', '.join(known)}")
    return [name for name in known if name in names]


def set_floors(
    run: Run, cases: list[Case], info: GetModelInfoResponse, adapter_bytes: dict[str, int]
) -> None:
    """What a step must read: the weights as our server has them, and the LoRAs."""
    shapes = load_config(default_model(), None).shapes
    base = step_nbytes(shapes, getattr(torch, info.dtype))
    for case in cases:
        if not case.is_prefill:
            nbytes = base + sum(adapter_bytes[name] for name in case.adapters)
            run.results.set_floor(case.name, len(case.loras), nbytes)


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured. rows: of the first table; columns: its engines."""

    title: str
    columns: list[str]
    rows: list[dict[str, object]]
    engines: list[dict[str, object]]
    results: Results
    gaps: list[Gaps]
    bars: list[Bar]


def summary(run: Run, info: GetModelInfoResponse, peers: Peers, threads: int) -> Report:
    columns = [OFF, AUTO, *peers.about]
    return Report(
        title=f"Decoding, {info.dtype}, {threads} threads, tokens a second (medians)",
        columns=columns,
        rows=run.results.table(columns),
        engines=[line(f"{OFF}, {AUTO}", ourselves(info), "-", ""), *peers.table()],
        results=run.results,
        gaps=run.gaps,
        bars=bars(run.results, run.gap_ratios(), info.backend),
    )


def publish(measured: Report) -> None:
    """Tables on stdout; of parts that were not wanted there is none."""
    if measured.rows:
        report(measured.title, measured.rows)
    if heads := measured.results.heads_table():
        report("Heads on maths, tokens a second", heads)
    report("What ran", measured.engines)
    report("What it must reach", [bar.row for bar in measured.bars])


def write(measured: Report, out: Path) -> None:
    """Everything in speed.json, the first table in speed.svg."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(asdict(measured), indent=1) + "\n")
    (out / "speed.svg").write_text(chart(measured.title, measured.rows, measured.columns))


def ourselves(info: GetModelInfoResponse) -> About:
    """Our server as a peer would describe itself."""
    limit = os.environ.get("LORASTACK_ISA")
    instructions = f"{info.backend} (LORASTACK_ISA={limit})" if limit else info.backend
    return About(f"lorastack {info.version}", info.dtype, instructions, mixed_loras=True)


def write_loras(scratch: Path, cases: list[Case]) -> dict[str, Path]:
    """Random LoRAs on all projections, by id; only those that a case has."""
    used = {name for case in cases for name in case.adapters}
    folders = {name: scratch / name for name in LORAS if name in used}
    for name, folder in folders.items():
        write_adapter(folder, RANK, LORAS.index(name), tuple(TARGETS))
    return folders


def upload(client: Client, loras: dict[str, Path]) -> dict[str, int]:
    """Bytes of each LoRA on the device. The heads go up too."""
    client.upload(ADAPTERS / HEADS, HEADS)
    for name, folder in loras.items():
        client.upload(folder, name)
    return {name: client.load(name).device_bytes for name in loras}


if __name__ == "__main__":
    typer.run(main)
