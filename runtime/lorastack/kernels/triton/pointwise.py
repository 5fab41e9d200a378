"""What stands between the products of a step: embedding, norms, RoPE, SiLU.

Contract. Each kernel adds up what the product before it left (`Projection`), element by element in
a fixed order, so a token's bits depend on its own row alone. The hidden state is float32 from layer
to layer; what the next product reads is rounded once, to the model's dtype. Buckets are the first
dimension of what is written; of its rows, only those below the number of tokens are. Numbers of
tokens are int32 [1] on the device.

The plain reference is `model.backends.torch`, which rounds the hidden state, cosines and sines to
the model's dtype besides; in float32 both compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.launch import cdiv, launch, power_of_two

BLOCK = 1024  # columns of a program, where a row has several


@dataclass(frozen=True, slots=True)
class Projection:
    """A product that is still to be added up: parts in their order, the bias, the LoRAs' part.

    parts_CTO and lora_TO: float32, contiguous; bias_O: float32. The LoRAs' part counts for tokens
    whose `adapted_T` (int32) is not 0.
    """

    parts_CTO: Tensor
    bias_O: Tensor | None = None
    lora_TO: Tensor | None = None
    adapted_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotations:
    """RoPE. cos_NF, sin_NF: float32, times the model's rope scale; rows_T: int32, each token's row
    of them: its position, or its place in the step where they are made for the step."""

    cos_NF: Tensor
    sin_NF: Tensor
    rows_T: Tensor


@triton.jit
def _sums(parts, bucket, bias, lora, adapted, token, size, column, mask, C: tl.constexpr):
    """A token's projection at some columns. size: columns of a row; bucket: rows of a part."""
    at = token.to(tl.int64) * size + column
    total = tl.load(parts + at, mask=mask, other=0.0)
    for c in tl.static_range(1, C):
        total += tl.load(parts + c * tl.cast(bucket, tl.int64) * size + at, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=mask, other=0.0)
    if lora is not None:
        is_adapted = tl.load(adapted + token) != 0
        delta = tl.load(lora + at, mask=mask & is_adapted, other=0.0)
        total = tl.where(is_adapted, total + delta, total)
    return total


@triton.jit(do_not_specialize_on_alignment=["tokens", "num_tokens"])
def embed_kernel(tokens, embedding, hidden, num_tokens, H, BLOCK: tl.constexpr):
    """Grid: (tokens, blocks of H)."""
    t = tl.program_id(0)
    if t >= tl.load(num_tokens):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens + t).to(tl.int64) * H
    value = tl.load(embedding + row + column, mask=column < H)
    tl.store(hidden + t.to(tl.int64) * H + column, value.to(tl.float32), mask=column < H)


@triton.jit(
    do_not_specialize=["bucket"],
    do_not_specialize_on_alignment=["adapted", "outputs", "num_rows"],
)
def norm_kernel(
    parts, bucket, bias, lora, adapted, hidden, outputs, norm, x, num_rows, H, eps,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). C: parts, 0 without a projection. outputs: which tokens, None for all.

    The sum is kept in `hidden` only where all tokens are wanted: else nobody reads it.
    """
    row = tl.program_id(0)
    if row >= tl.load(num_rows):
        return
    token = row
    if outputs is not None:
        token = tl.load(outputs + row)
    column = tl.arange(0, BLOCK)
    mask = column < H
    at = token.to(tl.int64) * H + column
    state = tl.load(hidden + at, mask=mask, other=0.0)
    if C > 0:
        state += _sums(parts, bucket, bias, lora, adapted, token, H, column, mask, C)
        if outputs is None:
            tl.store(hidden + at, state, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(state * state) / H + eps)
    value = state * scale * tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
    out = x + row.to(tl.int64) * H + column
    tl.store(out, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions", "lasts", "num_tokens"])
def turn_kernel(
    frequencies, positions, lasts, cos, sin, num_tokens, F, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: (tokens,)."""
    t = tl.program_id(0)
    if t >= tl.load(num_tokens):
        return
    i = tl.arange(0, BLOCK)
    mask = i < F
    position = tl.load(positions + t)
    length = tl.maximum(position, tl.load(lasts + t)).to(tl.int64)
    angle = position.to(tl.float32) * tl.load(frequencies + length * F + i, mask=mask, other=0.0)
    tl.store(cos + t * F + i, tl.cos(angle) * scale, mask=mask)
    tl.store(sin + t * F + i, tl.sin(angle) * scale, mask=mask)


@triton.jit(
    do_not_specialize=["bucket"],
    do_not_specialize_on_alignment=["adapted", "rows", "slots", "num_tokens"],
)
def rope_kernel(
    parts, bucket, bias, lora, adapted, cos, sin, rows, slots, q, kv, num_tokens,
    HQ, HKV, P, D, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, heads of q, k and v). BLOCK: at least half a head."""
    t, head = tl.program_id(0), tl.program_id(1)
    if t >= tl.load(num_tokens):
        return
    half = D // 2
    i = tl.arange(0, BLOCK)
    mask = i < half
    size = (HQ + 2 * HKV) * D
    column = head * D + i
    first = _sums(parts, bucket, bias, lora, adapted, t, size, column, mask, C)
    second = _sums(parts, bucket, bias, lora, adapted, t, size, column + half, mask, C)
    if head < HQ + HKV:
        turn = tl.load(rows + t).to(tl.int64) * half + i
        c = tl.load(cos + turn, mask=mask, other=0.0)
        s = tl.load(sin + turn, mask=mask, other=0.0)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    if head < HQ:
        out = q + (t.to(tl.int64) * HQ + head) * D + i
    else:
        slot = tl.load(slots + t)
        run = (slot // P).to(tl.int64) * (2 * HKV) + head - HQ
        out = kv + (run * P + slot % P) * D + i
    DTYPE: tl.constexpr = q.dtype.element_ty
    tl.store(out, first.to(DTYPE), mask=mask)
    tl.store(out + half, second.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["bucket"], do_not_specialize_on_alignment=["adapted", "num_tokens"])
def silu_kernel(
    parts, bucket, bias, lora, adapted, inner, num_tokens, size,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, blocks of the size)."""
    t = tl.program_id(0)
    if t >= tl.load(num_tokens):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = _sums(parts, bucket, bias, lora, adapted, t, 2 * size, column, mask, C)
    up = _sums(parts, bucket, bias, lora, adapted, t, 2 * size, column + size, mask, C)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(inner + t.to(tl.int64) * size + column, value.to(inner.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["bucket"], do_not_specialize_on_alignment=["adapted", "num_rows"])
def sum_kernel(
    parts, bucket, bias, lora, adapted, out, num_rows, size,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, blocks of the size)."""
    row = tl.program_id(0)
    if row >= tl.load(num_rows):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    value = _sums(parts, bucket, bias, lora, adapted, row, size, column, mask, C)
    tl.store(out + row.to(tl.int64) * size + column, value, mask=mask)


def embed(token_ids_T: Tensor, embed_VH: Tensor, hidden_TH: Tensor, num_tokens: Tensor) -> None:
    """hidden = the tokens' embeddings, in float32. token_ids_T: int32."""
    bucket, size = hidden_TH.shape
    grid = (bucket, cdiv(size, BLOCK))
    launch(embed_kernel, grid, token_ids_T, embed_VH, hidden_TH, num_tokens, size, BLOCK=BLOCK)


def add_norm(
    projection: Projection | None,
    hidden_TH: Tensor,
    norm_H: Tensor,
    x_TH: Tensor,
    num_tokens: Tensor,
    eps: float,
) -> None:
    """hidden += the projection, where there is one; x = RMSNorm(hidden) * norm."""
    _norm(projection, hidden_TH, None, norm_H, x_TH, num_tokens, eps)


def gather_norm(
    projection: Projection,
    hidden_TH: Tensor,
    outputs_X: Tensor,
    norm_H: Tensor,
    hidden_XH: Tensor,
    num_outputs: Tensor,
    eps: float,
) -> None:
    """hidden_XH = RMSNorm(hidden_TH + the projection) * norm at the tokens outputs_X (int32).

    hidden_TH stays as it is.
    """
    _norm(projection, hidden_TH, outputs_X, norm_H, hidden_XH, num_outputs, eps)


def _norm(
    projection: Projection | None,
    hidden_TH: Tensor,
    outputs_X: Tensor | None,
    norm_H: Tensor,
    x_XH: Tensor,
    num_rows: Tensor,
    eps: float,
) -> None:
    bucket, size = x_XH.shape
    launch(
        norm_kernel,
        (bucket,),
        *_pointers(projection),
        *(hidden_TH, outputs_X, norm_H, x_XH, num_rows, size, eps),
        C=0 if projection is None else len(projection.parts_CTO),
        BLOCK=power_of_two(size),
        num_warps=norm_warps(size),
    )


def turn(
    inv_freq_PF: Tensor,
    positions_T: Tensor,
    lasts_T: Tensor,
    scale: float,
    cos_TF: Tensor,
    sin_TF: Tensor,
    num_tokens: Tensor,
) -> None:
    """Dynamic RoPE's cosines and sines of a step's tokens, for `Rotations` of their places.

    inv_freq_PF: float32, see `model.rope`; row n - 1 is for a text of n tokens. lasts_T: int32, the
    last position of the prompt of each token's row. scale: the model's rope scale.
    """
    bucket, size = cos_TF.shape
    launch(
        turn_kernel,
        (bucket,),
        *(inv_freq_PF, positions_T, lasts_T, cos_TF, sin_TF, num_tokens, size, scale),
        BLOCK=power_of_two(size),
        num_warps=1,
    )


def rope_write(
    qkv: Projection,
    rotations: Rotations,
    slots_T: Tensor,
    q_THD: Tensor,
    kv: Tensor,
    num_tokens: Tensor,
) -> None:
    """Turned queries into q, turned keys and values into their slots of a layer's pages.

    q_THD: of the model's dtype, contiguous; kv: the same, [pages, 2, kv heads, P, D], contiguous;
    slots_T: int32, page * P + place.
    """
    bucket, num_heads, head_dim = q_THD.shape
    num_kv_heads, page_size = kv.shape[2:4]
    launch(
        rope_kernel,
        (bucket, num_heads + 2 * num_kv_heads),
        *_pointers(qkv),
        *(rotations.cos_NF, rotations.sin_NF, rotations.rows_T, slots_T, q_THD, kv, num_tokens),
        *(num_heads, num_kv_heads, page_size, head_dim),
        C=len(qkv.parts_CTO),
        BLOCK=power_of_two(head_dim // 2),
        num_warps=1,
    )


def silu_mul(gate_up: Projection, inner_TI: Tensor, num_tokens: Tensor) -> None:
    """inner = silu(gate) * up. The projection has gates first: [C, T, 2 I]."""
    bucket, size = inner_TI.shape
    launch(
        silu_kernel,
        (bucket, cdiv(size, BLOCK)),
        *(*_pointers(gate_up), inner_TI, num_tokens, size),
        C=len(gate_up.parts_CTO),
        BLOCK=BLOCK,
    )


def add_parts(projection: Projection, out_XO: Tensor, num_rows: Tensor) -> None:
    """out = the projection, float32. out may be its first part."""
    bucket, size = out_XO.shape
    launch(
        sum_kernel,
        (bucket, cdiv(size, BLOCK)),
        *(*_pointers(projection), out_XO, num_rows, size),
        C=len(projection.parts_CTO),
        BLOCK=BLOCK,
    )


def _pointers(projection: Projection | None) -> tuple[object, ...]:
    """The first arguments of the kernels that add a projection up."""
    if projection is None:
        return (None, 0, None, None, None)
    rest = (projection.bias_O, projection.lora_TO, projection.adapted_T)
    return (projection.parts_CTO, projection.parts_CTO.shape[1], *rest)


def norm_warps(size: int) -> int:
    """Of a program that normalises a row: 4 to 16 values a thread at a time."""
    return max(1, min(8, size // 256))
