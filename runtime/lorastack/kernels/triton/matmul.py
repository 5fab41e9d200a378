"""y = x W^T for the tokens of a step, in bits that depend on a token's own x alone.

Contract. The inputs of a matrix are cut into chunks, by its plan and never by the number of tokens.
`matmul(x_TI, weight, parts_CTO, num_tokens)` gives partial sums in float32, and

    y[t] = parts[0, t] + parts[1, t] + ...

in this order, is x[t] W^T without the bias. A chunk's inputs are added in order by the device's
matrix instructions (float32: one product after the other). Buckets of few tokens spread the chunks
over programs, a part each; larger ones take them in turn in one program and add them as above, so
that there is one part. Either way the sum is the same. Rows beyond the number of tokens are neither
read nor written, and NaN stays in its own row.

A quantised weight (see `kernels.quantize`) is widened to bfloat16 in registers, and x is bfloat16:
int8 codes as they are, the chunk's sums times the scale; int4 codes times their scales, exactly.

Tokens are the narrow side of the products: 16 of them pay for no more than 16. The plain reference
is torch.nn.functional.linear on `kernels.linear.plain_weight`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton.launch import cdiv, launch, power_of_two
from lorastack.kernels.triton.weight import SPREAD_TOKENS, Weight

BITS = {None: 16, Kind.INT8: 8, Kind.INT4: 4}


@triton.jit
def _weights_of_codes(codes, BIAS: tl.constexpr):
    """Unsigned bytes minus BIAS as float32, without a conversion: 2^23 + byte has them as bits."""
    bits = codes.to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + BIAS)


@triton.jit
def _scaled(values, scales, groups: tl.constexpr):
    """values [outputs, 32 groups] times the scales [outputs, groups] of their groups."""
    BN: tl.constexpr = values.shape[0]
    BK: tl.constexpr = values.shape[1]
    grouped = values.reshape(BN, groups, BK // groups) * scales[:, :, None]
    return grouped.reshape(BN, BK)


@triton.jit
def _inputs(x_T, k, K, EVEN: tl.constexpr):
    """x at the inputs k, [inputs, tokens]; zeros beyond the last."""
    if EVEN:
        return tl.load(x_T + k[:, None])
    return tl.load(x_T + k[:, None], mask=(k < K)[:, None], other=0.0)


@triton.jit
def _chunk(
    x_T, w, scales, n, begin, end, N, K,
    BITS: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums over the inputs begin..end, [BN, BT]."""
    DTYPE: tl.constexpr = x_T.dtype.element_ty
    HALF: tl.constexpr = BK // 2
    total = tl.zeros((BN, BT), tl.float32)
    for k0 in range(begin, end, BK):
        k = k0 + tl.arange(0, BK)
        tile = (k0 // BK) * tl.cast(N, tl.int64) + n  # of codes
        if BITS == 8:
            codes = tl.load(w + tile[:, None] * BK + tl.arange(0, BK)[None, :])
            w_NK = _weights_of_codes(codes, 128).to(DTYPE)
            total = tl.dot(w_NK, _inputs(x_T, k, K, EVEN), total, input_precision="ieee")
        elif BITS == 4:
            codes = tl.load(w + tile[:, None] * HALF + tl.arange(0, HALF)[None, :])
            for half in tl.static_range(2):
                group = tl.arange(0, HALF // 32) + half * (HALF // 32)
                scale = tl.load(scales + tile[:, None] * (BK // 32) + group[None, :])
                w_NK = _weights_of_codes(codes >> 4 if half else codes & 15, 8)
                w_NK = _scaled(w_NK, scale.to(tl.float32), HALF // 32).to(DTYPE)
                x_KT = _inputs(x_T, k0 + half * HALF + tl.arange(0, HALF), K, EVEN)
                total = tl.dot(w_NK, x_KT, total, input_precision="ieee")
        else:
            rows = w + n.to(tl.int64)[:, None] * K + k[None, :]
            w_NK = tl.load(rows) if EVEN else tl.load(rows, mask=(k < K)[None, :], other=0.0)
            total = tl.dot(w_NK, _inputs(x_T, k, K, EVEN), total, input_precision="ieee")
    if BITS == 8:
        total *= tl.load(scales + n).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["bucket"], do_not_specialize_on_alignment=["num_tokens"])
def matmul_kernel(
    x, w, scales, parts, bucket, num_tokens, N, K, KC,
    BITS: tl.constexpr, SPREAD: tl.constexpr, EVEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: (token tiles, output tiles, chunks of KC inputs if SPREAD else 1).

    Programs that read the same weights stand together. bucket: rows of a part. BITS: of a code, 16
    of a plain weight. EVEN: the inputs are whole tiles of BK.
    """
    count = tl.load(num_tokens)
    if tl.program_id(0) * BT >= count:
        return
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # What lies beyond the last token or output reads what that one does, and is not stored.
    x_T = x + tl.minimum(t, count - 1).to(tl.int64)[None, :] * K
    last = tl.minimum(n, N - 1)
    if SPREAD:
        begin = tl.program_id(2) * KC
        end = tl.minimum(begin + KC, K)
        total = _chunk(x_T, w, scales, last, begin, end, N, K, BITS, EVEN, BT, BN, BK)
    else:
        total = tl.zeros((BN, BT), tl.float32)
        for begin in range(0, K, KC):
            end = tl.minimum(begin + KC, K)
            part = _chunk(x_T, w, scales, last, begin, end, N, K, BITS, EVEN, BT, BN, BK)
            total = tl.where(begin == 0, part, total + part)
    rows = tl.program_id(2).to(tl.int64) * bucket + t
    at = rows[None, :] * N + n[:, None]
    tl.store(parts + at, total, mask=(n < N)[:, None] & (t < count)[None, :])


def matmul(x_TI: Tensor, weight: Weight, parts_CTO: Tensor, num_tokens: Tensor) -> None:
    """See the module.

    x_TI: contiguous, of the model's dtype. parts_CTO: float32, contiguous, with T the bucket and
    C = weight.plan.num_parts(T). num_tokens: int32 [1] on the device, at most T.
    """
    assert weight.kind is None or x_TI.dtype == torch.bfloat16, "codes are widened to bfloat16"
    num_parts, bucket, outputs = parts_CTO.shape
    plan, blocks = weight.plan, blocks_of(weight, bucket)
    grid = (cdiv(bucket, blocks.tokens), cdiv(outputs, blocks.outputs), num_parts)
    launch(
        matmul_kernel,
        grid,
        *(x_TI, weight.values, weight.scales, parts_CTO, bucket),
        *(num_tokens, outputs, weight.num_inputs, plan.chunk),
        BITS=BITS[weight.kind],
        SPREAD=num_parts == plan.num_chunks,
        EVEN=weight.num_inputs % blocks.inputs == 0,
        BT=blocks.tokens,
        BN=blocks.outputs,
        BK=blocks.inputs,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


class Blocks(NamedTuple):
    """What a program takes at once; none of it changes a bit. stages: blocks on their way."""

    tokens: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def blocks_of(weight: Weight, bucket: int) -> Blocks:
    """Blocks for a bucket of tokens."""
    plan, is_plain = weight.plan, weight.kind is None
    if bucket > SPREAD_TOKENS:
        # One program fills a multiprocessor, so it may have up to 255 registers a thread.
        inputs = min(plan.block_inputs, 64) if is_plain else plan.block_inputs
        return Blocks(64, 2 * plan.block_outputs, inputs, 8, 4 if is_plain else 3)
    # Products of float32 are made of registers.
    most = 32 if weight.values.dtype == torch.float32 else SPREAD_TOKENS
    tokens = min(max(16, power_of_two(bucket)), most)
    stages = 3 if tokens == SPREAD_TOKENS else 4 if is_plain else 6
    return Blocks(tokens, plan.block_outputs, plan.block_inputs, 4, stages)
