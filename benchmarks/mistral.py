"""How near does Mistral-7B come to the memory's limit? At full size, with made-up weights.

Steps a second of 1 and 8 rows beside the floor (the bytes of the weights over the bandwidth just
before and after), of 8 rows with 8 rank-16 LoRAs beside 8 without, loads of one of these from the
disk to usable beside reading and copying its file, and the memory of the process when it has
loaded. Rounds take turns; medians, of ratios too.

    python -m benchmarks.mistral
    python -m benchmarks.mistral --quantize int8
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.load import traffic
from benchmarks.paging.cold_start import MISTRAL_7B, drop_cached, read
from benchmarks.report import report
from benchmarks.step import bandwidth
from examples.local_server import LocalServer, local_server
from lorastack.client import Client
from lorastack.kernels.quantize import Kind
from lorastack.model.size import step_nbytes
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.adapters import write_lora
from tests.integration.mistral_7b.checkpoint import FULL, HUB_ID, synthetic

RANK, NUM_LORAS = 16, 8
NUM_TOKENS = 24  # generated for each request
PROMPT = "Why is the sky blue during the day, and red in the evening?"
BASE_1, BASE_8, LORAS_8 = "1 row", "8 rows", f"8 rows, {NUM_LORAS} LoRAs of rank {RANK}"


def main(
    quantize: Annotated[str | None, typer.Option(help="int8 or int4; bfloat16 without.")] = None,
    rounds: Annotated[int, typer.Option(help="Of every timing, after one to warm up.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure.", show_default="the system's")
    ] = None,
) -> None:
    """Measure and print tables and JSON lines."""
    torch.set_num_threads(threads)
    options = ["--model", str(synthetic(FULL)), "--dtype", "bfloat16", "--threads", str(threads)]
    options += ["--kv-memory", "512MiB", "--base-name", HUB_ID]
    options += ["--quantize", quantize] if quantize else []
    with tempfile.TemporaryDirectory(prefix="lorastack-", dir=folder) as scratch:
        loras = write_loras(Path(scratch))
        store = Path(scratch, "store")
        began = time.perf_counter()
        with local_server(*options, "--store", str(store)) as server:
            memory = resident(server) | {"start s": round(time.perf_counter() - began, 1)}
            steps = measure_steps(server, loras, rounds, quantize)
            loads = measure_loads(server, store, loras[0], rounds)
    name = quantize or "bfloat16"
    report(f"Mistral-7B in {name}, {threads} threads: steps without drafts", steps)
    report(f"A cold load of a rank-{RANK} LoRA", [loads])
    report("Memory of the process, and its start", [memory])


def write_loras(root: Path) -> list[Path]:
    """Rank-16 LoRAs on all projections."""
    return [
        write_lora(root / f"lora-{index}", MISTRAL_7B, seed=index, rank=RANK, dtype=torch.bfloat16)
        for index in range(NUM_LORAS)
    ]


def resident(server: LocalServer) -> dict[str, object]:
    """Gigabytes (1e9) in memory now, and the most there ever were."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    kib_by_name = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return {f"{name} GB": round(int(kib) * 1024 / 1e9, 2) for name, kib in kib_by_name.items()}


def measure_steps(
    server: LocalServer, loras: Sequence[Path], rounds: int, quantize: str | None
) -> list[dict[str, object]]:
    """A row of the table a case."""
    with Client(server.address) as client:
        for lora in loras:
            client.upload(lora, lora.name)
            client.load(lora.name)
    names = [lora.name for lora in loras]
    cases = {BASE_1: [""], BASE_8: [""] * len(names), LORAS_8: names}
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    bandwidths: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, row_loras in cases.items():
            before = bandwidth(5)
            slots = [[request(lora, number)] for lora in row_loras]
            rate = traffic.steady_rate(traffic.run(server.address, slots)) / len(slots)
            if number:
                speeds[name].append(rate)
                bandwidths[name].append((before + bandwidth(5)) / 2)
    nbytes = step_nbytes(MISTRAL_7B, torch.bfloat16, None if quantize is None else Kind(quantize))
    floors = {name: [each / nbytes for each in measured] for name, measured in bandwidths.items()}
    return [
        {
            "": name,
            "steps/s": round(statistics.median(rates), 3),
            "ms": round(1000 / statistics.median(rates)),
            "GB/s": round(statistics.median(bandwidths[name]) / 1e9, 1),
            "of the floor": f"{_median_ratio(rates, floors[name]):.0%}",
            "of 8 rows": f"{_median_ratio(rates, speeds[BASE_8]):.0%}",
        }
        for name, rates in speeds.items()
    ]


def _median_ratio(values: Sequence[float], beside: Sequence[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(values, beside, strict=True))


def request(lora: str, number: int) -> bytes:
    """Greedy, past the end token, without drafts; each round's prompt is new to the cache."""
    return pb.GenerateRequest(
        prompt=f"{number}: {PROMPT}",
        lora_id=lora,
        medusa_id=traffic.NO_HEADS,
        speculation=pb.Speculation(mode=pb.OFF),
        stop=pb.StopParams(max_new_tokens=NUM_TOKENS, ignore_eos=True),
    ).SerializeToString()


def measure_loads(server: LocalServer, store: Path, lora: Path, rounds: int) -> dict[str, object]:
    """Medians; the load and the plain read and copy of as many bytes in turns."""
    source = lora / "adapter_model.safetensors"
    stored = [path for path in store.rglob("*") if path.is_file()]
    memory = [np.zeros(source.stat().st_size, dtype=np.uint8) for _ in range(2)]
    plain, loads = [], []
    with Client(server.address) as client:
        for _ in range(rounds + 1):
            drop_cached(source)
            began = time.perf_counter()
            read(source, memory[0])
            np.copyto(memory[1], memory[0])
            plain.append(time.perf_counter() - began)
            client.unload(lora.name)
            for path in stored:
                drop_cached(path)
            began = time.perf_counter()
            client.load(lora.name)
            loads.append(time.perf_counter() - began)
    limit, load = statistics.median(plain), statistics.median(loads)
    return {
        "MB": round(source.stat().st_size / 1e6, 1),
        "read + copy ms": round(1000 * limit),
        "load ms": round(1000 * load),
        "share of bandwidth": round(limit / load, 2),
    }


if __name__ == "__main__":
    typer.run(main)
