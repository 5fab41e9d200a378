"""What each Triton kernel is compiled with ahead of time: its launches for Mistral-7B, and bounds.

A case calls a launcher, so types, constants, warps and stages are those of a step. Its tensors are
on the meta device: of their numbers nothing is wanted. Bounds hold for every architecture. A thread
of three programs of 4 warps a multiprocessor may have 168 registers; who has more says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton import accept, attention, heads, lora, matmul, pointwise, samples, top
from lorastack.kernels.triton.attention_plan import AttentionArrays, AttentionShape
from lorastack.kernels.triton.heads_plan import FIELDS, Pairs
from lorastack.kernels.triton.lora_plan import PAIR_FIELDS, TILE_FIELDS, LoraArrays
from lorastack.kernels.triton.weight import SPREAD_TOKENS, MatmulPlan, Weight
from tests.helpers.compiled import Compiled, Recorder
from tests.helpers.launches import launching

BFLOAT16, FLOAT32, INT32, INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
HIDDEN, INNER, HEADS, KEY_HEADS, DIM, PAGE = 4096, 14336, 32, 8, 128, 16
KEYS, VOCABULARY = KEY_HEADS * DIM, 131072
MAX_REGISTERS = 168
FEW, SPREAD, MANY = 8, SPREAD_TOKENS, SPREAD_TOKENS + 1  # buckets of a matmul
MISTRAL = AttentionShape(HEADS, KEY_HEADS, DIM, PAGE, None)


class Products(Enum):
    """How a kernel multiplies matrices."""

    NONE = "without matrix instructions: those of float32 would round"
    MATRIX = "with matrix instructions"
    GROUP = "on sm_90 with those of four warps together"


@dataclass(frozen=True, slots=True)
class Case:
    """run: launches, in the end, `kernel`. registers: at most, a thread. shared: bytes at most, 0
    for what the architecture has. wide: some loads take 16 bytes. ahead: it fetches what it
    multiplies ahead, all of it 16 bytes at once.

    local, narrow: why it may use local memory, and fetch fewer bytes; empty where it may not.
    """

    kernel: Any
    run: Callable[[], object]
    registers: int = MAX_REGISTERS
    shared: int = 0
    products: Products = Products.NONE
    wide: bool = False
    ahead: bool = False
    local: str = ""
    narrow: str = ""

    def compiled(self, architecture: int) -> Compiled:
        recorder = Recorder()
        with launching(recorder):
            self.run()
        found = [each for each in recorder.launches if each.kernel is self.kernel]
        return found[-1].compiled(architecture)


def _meta(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


COUNT = _meta(1, dtype=INT32)
IDS = _meta(1, dtype=INT32)


def _matmul(bucket: int, dtype: torch.dtype, kind: Kind | None, inputs: int = INNER) -> None:
    """Of down_proj. Blocks depend on the bucket and types alone: one matrix stands for all."""
    plan = MatmulPlan.of(HIDDEN, inputs, dtype, kind)
    values = _meta(0, dtype=torch.uint8 if kind else dtype)
    scales = _meta(0, dtype=BFLOAT16) if kind else None
    weight = Weight(values, None, HIDDEN, inputs, plan, kind, scales)
    parts_CTO = _meta(plan.num_parts(bucket), bucket, HIDDEN)
    matmul.matmul(_meta(bucket, inputs, dtype=dtype), weight, parts_CTO, COUNT)


LORA = LoraArrays(
    counts=_meta(2, dtype=INT32),
    adapted_T=IDS,
    tiles=_meta(1, TILE_FIELDS, dtype=INT32),
    pairs=_meta(1, PAIR_FIELDS, dtype=INT64),
)


def _shrink(dtype: torch.dtype) -> None:
    lora.shrink(_meta(1, HIDDEN, dtype=dtype), LORA, 0, _meta(4, 64), 1)


def _expand(outputs: list[int], inputs: int, dtype: torch.dtype) -> None:
    shrunk_CS, delta_TO = _meta(inputs // lora.CHUNK, 64), _meta(1, sum(outputs))
    lora.expand(shrunk_CS, LORA, 0, outputs, inputs, dtype, delta_TO, 1)


def _add_embedding() -> None:
    lora.add_embedding(IDS, LORA, 0, VOCABULARY, BFLOAT16, _meta(1, HIDDEN), 1)


def _attend(shape: AttentionShape, dtype: torch.dtype) -> None:
    """The attention, and the sum over its splits."""
    lengths = AttentionArrays.lengths(1, 1, 16)
    step = AttentionArrays(**{name: _meta(*size, dtype=INT32) for name, size in lengths.items()})
    kv = _meta(1, 2, shape.num_kv_heads, shape.page_size, shape.head_dim, dtype=dtype)
    q_TX = _meta(1, shape.num_heads * shape.head_dim, dtype=dtype)
    workspace = attention.AttentionWorkspace.of(shape, 1, 1, torch.device("meta"))
    attention.attend(q_TX, kv, step, workspace, torch.empty_like(q_TX), shape, 1)


def _projection(size: int) -> pointwise.Projection:
    """With all that it may have: four parts, a bias, LoRAs."""
    return pointwise.Projection(_meta(4, 1, size), _meta(size), _meta(1, size), IDS)


def _embed() -> None:
    embed_VH = _meta(VOCABULARY, HIDDEN, dtype=BFLOAT16)
    pointwise.embed(IDS, embed_VH, _meta(1, HIDDEN), COUNT)


NORM_H, NORMED = _meta(HIDDEN, dtype=BFLOAT16), _meta(1, HIDDEN, dtype=BFLOAT16)


def _first_norm() -> None:
    pointwise.add_norm(None, _meta(1, HIDDEN), NORM_H, NORMED, COUNT, 1e-5)


def _add_norm() -> None:
    projection, hidden_TH = _projection(HIDDEN), _meta(1, HIDDEN)
    pointwise.add_norm(projection, hidden_TH, NORM_H, NORMED, COUNT, 1e-5)


def _gather_norm() -> None:
    projection, hidden_TH = _projection(HIDDEN), _meta(1, HIDDEN)
    pointwise.gather_norm(projection, hidden_TH, IDS, NORM_H, NORMED, COUNT, 1e-5)


def _turn() -> None:
    turns = _meta(1, DIM // 2)
    pointwise.turn(_meta(4096, DIM // 2), IDS, IDS, 1.0, turns, turns, COUNT)


def _rope() -> None:
    turns = pointwise.Rotations(_meta(4096, DIM // 2), _meta(4096, DIM // 2), IDS)
    kv = _meta(1, 2, KEY_HEADS, PAGE, DIM, dtype=BFLOAT16)
    q_THD = _meta(1, HEADS, DIM, dtype=BFLOAT16)
    pointwise.rope_write(_projection(HIDDEN + 2 * KEYS), turns, IDS, q_THD, kv, COUNT)


def _silu() -> None:
    pointwise.silu_mul(_projection(2 * INNER), _meta(1, INNER, dtype=BFLOAT16), COUNT)


def _add_parts() -> None:
    pointwise.add_parts(_projection(VOCABULARY), _meta(1, VOCABULARY), COUNT)


def _sample() -> None:
    """The best tokens, and the draws among all."""
    nodes = samples.Nodes(IDS, IDS, _meta(1, samples.SETTINGS, dtype=INT64), COUNT)
    keys_XS = _meta(1, samples.num_spans(VOCABULARY), dtype=INT64)
    samples.sample(_meta(1, VOCABULARY), nodes, keys_XS, samples.Sampled(_meta(1), IDS, IDS), 1)


ACCEPTED = accept.Accepted(IDS, IDS, _meta(1, 64, dtype=INT32), _meta(1, 64, dtype=INT32))


def _accept() -> None:
    accept.accept(IDS, accept.Trees(IDS, IDS, IDS, IDS, COUNT), ACCEPTED, 1, 64)


def _move_kv() -> None:
    kv = _meta(32, 1, 2, KEY_HEADS, PAGE, DIM, dtype=BFLOAT16)
    accept.move_kv(kv, ACCEPTED, accept.Slots(IDS, IDS, IDS), COUNT, 1)


def _pairs() -> Pairs:
    tiles, ids = _meta(1, FIELDS, dtype=INT64), _meta(1, dtype=INT64)
    return Pairs(tiles, tiles, IDS, IDS, ids, _meta(3, dtype=INT32))


def _states(num_blocks: int, max_rank: int = 0) -> None:
    hidden_XH = _meta(1, HIDDEN, dtype=BFLOAT16)
    r_LYH = _meta(num_blocks, 1, HIDDEN, dtype=BFLOAT16)
    heads.states(hidden_XH, IDS, _pairs(), r_LYH, 1, num_blocks, max_rank)


def _logits(dtype: torch.dtype) -> None:
    heads.logits(_meta(1, 1, HIDDEN, dtype=dtype), _pairs(), _meta(1, VOCABULARY), 1)


def _top() -> None:
    """Of as many tokens as a head may propose."""
    top.top(_meta(1, VOCABULARY), _pairs(), _meta(1, 64, dtype=INT32), _meta(1, 64), 1)


def _matmuls() -> dict[str, Case]:
    cases = {}
    for kind in (None, *Kind):
        name = "matmul" if kind is None else f"matmul {kind.value}"
        # Four warps together take codes as registers, in whose order they are fetched.
        narrow = "" if kind is None else "codes are fetched as sm_90 multiplies them"
        case = Case(
            *(matmul.matmul_kernel, partial(_matmul, FEW, BFLOAT16, kind)),
            products=Products.GROUP,
            wide=True,
            ahead=True,
            narrow=narrow,
        )
        cases[f"{name}, few tokens"] = case
        run = partial(_matmul, SPREAD, BFLOAT16, kind)
        cases[f"{name}, most that are spread"] = replace(case, run=run)
        # Such a program has a multiprocessor to itself.
        run = partial(_matmul, MANY, BFLOAT16, kind)
        cases[f"{name}, many tokens"] = replace(case, run=run, registers=255)
        # Rows of x, and of plain weights, that begin anywhere are read number by number.
        run, fetched = partial(_matmul, FEW, BFLOAT16, kind, INNER - 1), kind is not None
        cases[f"{name}, odd inputs"] = replace(case, run=run, wide=False, ahead=fetched)
    for bucket, load in ((SPREAD, "most that are spread"), (MANY, "many tokens")):
        # The products are made of registers.
        run = partial(_matmul, bucket, FLOAT32, None)
        case = Case(matmul.matmul_kernel, run, registers=255, wide=True, ahead=True)
        cases[f"matmul float32, {load}"] = case
    return cases


MULTIPLIED = partial(Case, products=Products.MATRIX, wide=True)
QKV = [HIDDEN, KEYS, KEYS]
# The workspace lies number by number, B is read 16 bytes at once.
EXPAND = partial(MULTIPLIED, lora.expand_kernel)
CASES: dict[str, Case] = {
    **_matmuls(),
    "shrink": MULTIPLIED(lora.shrink_kernel, partial(_shrink, BFLOAT16), ahead=True),
    "shrink float32": Case(lora.shrink_kernel, partial(_shrink, FLOAT32), wide=True, ahead=True),
    "expand": EXPAND(partial(_expand, QKV, HIDDEN, BFLOAT16)),
    "expand of many chunks": EXPAND(partial(_expand, [HIDDEN], INNER, BFLOAT16)),
    "expand float32": EXPAND(partial(_expand, QKV, HIDDEN, FLOAT32), products=Products.NONE),
    "embedding delta": EXPAND(_add_embedding),
    # Half of what sm_80 may have, so that a multiprocessor holds three programs.
    "attention": MULTIPLIED(
        *(attention.attention_kernel, partial(_attend, MISTRAL, BFLOAT16)),
        shared=50 << 10,
        ahead=True,
    ),
    # Such a program has 8 warps and a multiprocessor to itself, and no room to fetch ahead.
    "attention of wide heads": MULTIPLIED(
        attention.attention_kernel,
        partial(_attend, replace(MISTRAL, head_dim=256), BFLOAT16),
        registers=232,
    ),
    "attention float32": Case(
        *(attention.attention_kernel, partial(_attend, replace(MISTRAL, head_dim=16), FLOAT32)),
        wide=True,
        ahead=True,
    ),
    "sum over splits": Case(attention.combine_kernel, partial(_attend, MISTRAL, BFLOAT16), 64),
    "embed": Case(pointwise.embed_kernel, _embed, 128, wide=True),
    "norm": Case(pointwise.norm_kernel, _add_norm, 128, wide=True),
    "first norm": Case(pointwise.norm_kernel, _first_norm, 128, wide=True),
    "norm of outputs": Case(pointwise.norm_kernel, _gather_norm, 128, wide=True),
    "turn": Case(
        *(pointwise.turn_kernel, _turn, 128),
        local="exact cosines of large angles index a table of theirs",
    ),
    "rope": Case(pointwise.rope_kernel, _rope, 128),
    "silu": Case(pointwise.silu_kernel, _silu, 128, wide=True),
    "sum of parts": Case(pointwise.sum_kernel, _add_parts, 128, wide=True),
    "best tokens": Case(samples.best_kernel, _sample, 64),
    # 16 warps: more than 128 registers would not even start.
    "draws": Case(samples.sample_kernel, _sample, 128),
    "acceptance": Case(accept.accept_kernel, _accept, 64),
    "moves": Case(accept.move_kernel, _move_kv, 64, wide=True),
    "first states": MULTIPLIED(heads.states_kernel, partial(_states, 1), 128, ahead=True),
    # Blocks behind the first read states where they write them.
    "later states": MULTIPLIED(heads.states_kernel, partial(_states, 2), 128, ahead=True),
    "first states, with private parts": MULTIPLIED(
        *(heads.states_kernel, partial(_states, 1, 64), 128),
        ahead=True,
        narrow="rows of B begin anywhere",
    ),
    "later states, with private parts": MULTIPLIED(
        *(heads.states_kernel, partial(_states, 2, 64), 128),
        ahead=True,
        narrow="rows of B begin anywhere",
    ),
    "what private parts make of first states": MULTIPLIED(
        heads.shrink_kernel, partial(_states, 1, 64), 128, ahead=True
    ),
    "what private parts make of later states": MULTIPLIED(
        heads.shrink_kernel, partial(_states, 2, 64), 128, ahead=True
    ),
    "logits of heads": MULTIPLIED(heads.logits_kernel, partial(_logits, BFLOAT16), 128, ahead=True),
    "logits of heads, float32": Case(
        *(heads.logits_kernel, partial(_logits, FLOAT32), 128), wide=True, ahead=True
    ),
    "top": Case(top.top_kernel, _top, 128),
}
