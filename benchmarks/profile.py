"""Where does a native decoder step's time go?

The default model in bfloat16 without a server, on a build of the native library that notes how long
each phase of a step takes (thread 0's time, waiting for the other threads included). Milliseconds,
medians; `outside` is Python and whatever else is not in a phase. Rows have decoded PAST tokens.
Drafting is measured beside the step: four heads of one block, 4,096 tokens to choose from.

    python -m benchmarks.profile
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.report import report, seconds
from benchmarks.step import bandwidth
from lorastack.kernels.attention import RowSpan
from lorastack.kernels.heads import HeadsGroup, HeadsWeights
from lorastack.kernels.native import build
from lorastack.kernels.native.isa import isa_named
from lorastack.kernels.native.library import library
from lorastack.kernels.packing import allocate
from lorastack.layout import LAYER_TARGETS, ModelShapes, Part
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch
from lorastack.model.fetch.default import default_model
from lorastack.model.size import step_nbytes

CPU = torch.device("cpu")
PAGE, RANK, NUM_LORAS = 16, 16, 8
HEADS, DRAFT_VOCABULARY = 4, 4096
# A layer's phases in their order, by the column that shows them; the second ones with LoRAs only.
LAYER = ("other", "LoRA", "projections", "other", "attention", "LoRA", "projections", "other",
         "LoRA", "projections", "LoRA", "projections")  # fmt: skip
COLUMNS = ("projections", "lm_head", "attention", "LoRA", "other")


def main(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of every step.")] = 25,
    isa: Annotated[
        str | None, typer.Option(envvar="LORASTACK_ISA", help="As of `lorastack serve`.")
    ] = None,
) -> None:
    """Measure and print a table and a JSON line."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="lorastack-") as folder:
        build.LIBRARY = Path(folder, "profile.so")
        if problem := build.build(build.LIBRARY, ("-DLORASTACK_PROFILE",)):
            raise typer.BadParameter(problem)
        decoder = load_backend(
            default_model(),
            device=CPU,
            dtype=torch.bfloat16,
            max_context=2048,
            at_most=isa_named(isa),
        )
        speed = bandwidth(repeats)
        profile = Profile(decoder, repeats)
        rows = [
            profile.rows(1, past=64),
            profile.rows(8, past=64),
            profile.rows(8, past=512),
            profile.rows(8, past=64, loras=True),
            profile.rows(32, past=64),
            profile.prompt(256, past=0),
            profile.prompt(256, past=768),
        ]
    floor = step_nbytes(decoder.shapes, torch.bfloat16) / speed
    report(
        f"A step of {decoder.name}, {threads} threads, ms",
        rows,
        gigabytes_a_second=round(speed / 1e9, 1),
        weights_floor_ms=round(1000 * floor, 2),
    )


class Profile:
    """Steps of one decoder."""

    def __init__(self, decoder: Backend, repeats: int) -> None:
        self._decoder = decoder
        self._repeats = repeats
        self._kv = decoder.make_kv(600, PAGE)
        self._kv.data.zero_()
        self._loras = [random_lora(decoder.shapes, seed) for seed in range(NUM_LORAS)]
        loaded = library()
        assert loaded is not None, "it was built just now"
        self._ticks = (ctypes.c_double * 4096).in_dll(loaded, "lorastack_phase_seconds")
        self._count = ctypes.c_int32.in_dll(loaded, "lorastack_num_phases")

    def rows(self, count: int, *, past: int, loras: bool = False) -> dict[str, object]:
        """A token of each row; with `loras` each row has its own."""
        pages = past // PAGE + 1
        spans = tuple(
            RowSpan(row, row + 1, range(row * pages, (row + 1) * pages), past)
            for row in range(count)
        )
        uses = [Segment(row, row + 1, self._loras[row % NUM_LORAS], 1.0) for row in range(count)]
        name = f"{count} rows, {past} past" + (f", {NUM_LORAS} LoRAs" if loras else "")
        lora = LoraBatch(tuple(uses) if loras else ())
        batch = ForwardBatch(range(1000, 1000 + count), spans, range(count), lora)
        return self._measure(name, batch, self._draft(count))

    def prompt(self, count: int, *, past: int) -> dict[str, object]:
        span = RowSpan(0, count, range((past + count) // PAGE), past)
        batch = ForwardBatch(range(1000, 1000 + count), (span,), (count - 1,))
        return self._measure(f"prompt {past}..{past + count}", batch, None)

    def _measure(
        self, name: str, batch: ForwardBatch, draft: Callable[[], object] | None
    ) -> dict[str, object]:
        columns: dict[str, list[float]] = {column: [] for column in (*COLUMNS, "outside")}
        for _ in range(self._repeats):
            self._count.value = 0
            took = seconds(partial(self._decoder.forward, batch, self._kv))
            seconds_of = by_column(self._ticks[: self._count.value], bool(batch.lora))
            seconds_of["outside"] = took - sum(seconds_of.values())
            for column, value in seconds_of.items():
                columns[column].append(value)
        row: dict[str, object] = {"step": name}
        row |= {key: round(1000 * statistics.median(each), 2) for key, each in columns.items()}
        drafting = [seconds(draft) for _ in range(self._repeats)] if draft else []
        row["drafting"] = round(1000 * statistics.median(drafting), 2) if drafting else "-"
        return row

    def _draft(self, count: int) -> Callable[[], object]:
        size = self._decoder.shapes.hidden_size
        heads = HeadsWeights(
            weight_LKHH=torch.randn(1, HEADS, size, size).to(self._decoder.dtype),
            bias_LKH=torch.randn(1, HEADS, size).to(self._decoder.dtype),
            output=torch.randn(DRAFT_VOCABULARY, size).to(self._decoder.dtype),
            ids_N=torch.arange(DRAFT_VOCABULARY),
        )
        hidden_BH = torch.randn(count, size).to(self._decoder.dtype)
        return partial(self._decoder.ops.propose, hidden_BH, [HeadsGroup(0, count, heads)], 8)


def by_column(phases: Sequence[float], loras: bool) -> dict[str, float]:
    """Seconds of a step's phases, summed by what they do. The first one embeds; the last ones are
    the final norm, lm_head and the best token."""
    layer = [column for column in LAYER if loras or column != "LoRA"]
    seconds_of = dict.fromkeys(COLUMNS, 0.0)
    seconds_of["other"] += phases[0] + phases[-3] + phases[-1]
    seconds_of["lm_head"] += phases[-2]
    for index, value in enumerate(phases[1:-3]):
        seconds_of[layer[index % len(layer)]] += value
    return seconds_of


def random_lora(shapes: ModelShapes, seed: int) -> LoraWeights:
    """Rank 16 on all projections."""
    parts = {}
    for layer in range(shapes.num_layers):
        for target in LAYER_TARGETS:
            out, size = shapes.target_shape(target)
            parts[layer, target, Part.A], parts[layer, target, Part.B] = (RANK, size), (out, RANK)
    scales = {(layer, target): 1.0 for layer, target, _ in parts}
    layout, buffer = allocate(parts, scales, 0, dtype=torch.bfloat16)
    buffer.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    return LoraWeights.from_buffer(buffer, layout)


if __name__ == "__main__":
    typer.run(main)
