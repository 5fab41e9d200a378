"""What does a decoder step cost, native and in torch, beside what reading the weights would cost?

The default model without a server: forward and logits of 1 to 32 rows that each decode one token,
and of a prompt chunk of 256. Backends take turns; medians. The floor is the bytes of the weights
over the bandwidth of this run (of a matrix-vector product larger than the caches, with as many
threads).

    python -m benchmarks.step
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer

from benchmarks.report import medians, report, seconds
from lorastack.kernels.attention import RowSpan
from lorastack.kernels.native.isa import isa_named
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch
from lorastack.model.fetch.default import default_model
from lorastack.model.size import step_nbytes

PAST, PAGE = 64, 16  # tokens
ROWS = (1, 4, 8, 16, 32)
CHUNK = 256
CPU = torch.device("cpu")


def main(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Calls that a timing takes.")] = 15,
    isa: Annotated[
        str | None, typer.Option(envvar="LORASTACK_ISA", help="As of `lorastack serve`.")
    ] = None,
) -> None:
    """Measure and print tables and JSON lines."""
    torch.set_num_threads(threads)
    speed = bandwidth(repeats)
    for dtype in (torch.bfloat16, torch.float32):
        decoders = [
            load_backend(
                default_model(),
                device=CPU,
                dtype=dtype,
                max_context=1024,
                native=native,
                at_most=isa_named(isa),
            )
            for native in (True, False)
        ]
        steps = {decoder.name: Steps(decoder) for decoder in decoders}
        floor = step_nbytes(decoders[0].shapes, dtype) / speed
        rows = [measure(steps, count, floor, repeats) for count in (*ROWS, CHUNK)]
        report(
            f"A step in {str(dtype).removeprefix('torch.')}, {threads} threads",
            rows,
            gigabytes_a_second=round(speed / 1e9, 1),
        )


class Steps:
    """Batches for one decoder."""

    def __init__(self, decoder: Backend) -> None:
        pages = (PAST + PAGE) // PAGE
        num_pages = max(max(ROWS) * pages, CHUNK // PAGE)
        self._decoder = decoder
        self._kv = decoder.make_kv(num_pages, PAGE)
        self._kv.data.zero_()
        self._pages = pages

    def run(self, count: int) -> None:
        """One token of each of `count` rows; CHUNK: a prompt, of which the last token counts."""
        rows = tuple(
            RowSpan(row, row + 1, range(row * self._pages, (row + 1) * self._pages), PAST)
            for row in range(count)
        )
        if count == CHUNK:
            rows = (RowSpan(0, CHUNK, range(CHUNK // PAGE), 0),)
        ids = range(1000, 1000 + count)
        outputs = (CHUNK - 1,) if count == CHUNK else range(count)
        self._decoder.forward(ForwardBatch(ids, rows, outputs), self._kv)


def measure(steps: dict[str, Steps], count: int, floor: float, repeats: int) -> dict[str, object]:
    row: dict[str, object] = {"tokens": "256 of a prompt" if count == CHUNK else count}
    by_step = medians({name: partial(step.run, count) for name, step in steps.items()}, repeats)
    row |= {f"{name} ms": round(1000 * median, 2) for name, median in by_step.items()}
    first, *others = by_step.values()
    row["ratio"] = round(others[0] / first, 2) if others else "-"
    row["floor ms"] = round(1000 * floor, 2)
    row["of the floor"] = f"{floor / first:.0%}" if count != CHUNK else "-"
    return row


def bandwidth(repeats: int) -> float:
    """Bytes a second that this machine reads now."""
    matrix, vector = torch.ones(1 << 14, 1 << 13), torch.ones(1 << 13)
    return matrix.nbytes / min(seconds(partial(torch.mv, matrix, vector)) for _ in range(repeats))


if __name__ == "__main__":
    typer.run(main)
