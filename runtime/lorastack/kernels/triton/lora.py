"""Segmented LoRA from the adapters' own buffers; contract: `kernels.segmented_lora`.

    shrunk[c, t] = sum over the inputs k of chunk c of x[t, k] A[:, k]
    h[t]         = (shrunk[0, t] + shrunk[1, t] + ...), rounded to the model's dtype
    delta[t]     = sum over the stack, in its order, of scale * (h[t] B^T)

in float32 but for h. Chunks have fixed sizes and a tile has tokens of one stack alone, so a
token's bits do not depend on the tokens beside it. The delta is one more part of the projection's
output, for the next kernel to add to tokens of tiles (`adapted_T`) and to no others: the base
model's rows keep their bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.launch import launch
from lorastack.kernels.triton.lora_plan import (
    PAIR_FIELDS,
    RANKS,
    SITE_FIELDS,
    TARGET_FIELDS,
    TILE,
    TILE_FIELDS,
    LoraArrays,
)

CHUNK = 1024  # inputs that are summed before chunks are
BLOCK_INPUTS = 256
BLOCK_OUTPUTS = 128
MAX_TILES = 32  # that a grid has programs for; they take more in turn
RANK_BLOCKS = 4  # likewise

_TYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_FIELDS = {
    "SITE": SITE_FIELDS,
    "TARGET": TARGET_FIELDS,
    "TILE": TILE_FIELDS,
    "PAIR": PAIR_FIELDS,
    "TOKENS": TILE,
    "RANKS": RANKS,
}


def shrink(
    x_TI: Tensor, step: LoraArrays[Tensor, Tensor], site: int, shrunk_CS: Tensor, bucket: int,
    chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Writes a site's h, in parts by chunk, to the workspace.

    x_TI: the group's input, contiguous, of the adapters' dtype; shrunk_CS: float32, a row for each
    of ceil(I / chunk) chunks, each of at least `workspace_size` floats; bucket: as everywhere, at
    least the step's tokens; chunk: part of the result's bits.
    """
    inputs = x_TI.shape[1]
    chunks = -(-inputs // chunk)
    block = min(BLOCK_INPUTS, chunk)
    assert chunk % block == 0, "a block must not reach into the next chunk"
    launch(
        shrink_kernel,
        (min(bucket, MAX_TILES), RANK_BLOCKS, chunks),
        *(x_TI, step.counts, step.pairs, shrunk_CS, shrunk_CS.stride(0), site),
        INPUTS=inputs,
        CHUNK=chunk,
        BLOCK=block,
        **{name: _FIELDS[name] for name in ("SITE", "PAIR", "TOKENS", "RANKS")},
        num_warps=4,
        num_stages=3,
    )


def expand(
    shrunk_CS: Tensor,
    step: LoraArrays[Tensor, Tensor],
    site: int,
    outputs: Sequence[int],
    inputs: int,
    dtype: torch.dtype,
    delta_TO: Tensor,
    bucket: int,
    *,
    chunk: int = CHUNK,
) -> None:
    """Writes the deltas of a site's targets, side by side, for the tokens of tiles.

    shrunk_CS: of `shrink` with these inputs and chunk; outputs: of each target of the group; dtype:
    of the adapters; delta_TO: float32, contiguous, [bucket, sum of outputs].
    """
    _expand(
        *(shrunk_CS, shrunk_CS.stride(0), step, site, tuple(outputs), delta_TO, bucket),
        dtype=dtype,
        CHUNKS=-(-inputs // chunk),
        VOCABULARY=0,
    )


def add_embedding(
    token_ids_T: Tensor,
    step: LoraArrays[Tensor, Tensor],
    site: int,
    vocab_size: int,
    dtype: torch.dtype,
    hidden_TH: Tensor,
    bucket: int,
) -> None:
    """Adds embed_tokens' deltas to hidden_TH, float32 and contiguous, in place. A's column of a
    token takes the place of h. token_ids_T: int32."""
    _expand(
        *(token_ids_T, 0, step, site, (hidden_TH.shape[1],), hidden_TH, bucket),
        dtype=dtype,
        CHUNKS=0,
        VOCABULARY=vocab_size,
    )


def _expand(
    source: Tensor,
    stride: int,
    step: LoraArrays[Tensor, Tensor],
    site: int,
    outputs: tuple[int, ...],
    out_TO: Tensor,
    bucket: int,
    dtype: torch.dtype,
    **constants: int,
) -> None:
    first, second, third = (*outputs, 0, 0)[:3]
    blocks = sum(-(-width // BLOCK_OUTPUTS) for width in outputs)
    launch(
        expand_kernel,
        (min(bucket, MAX_TILES), blocks),
        *(source, step.counts, step.tiles, step.pairs, out_TO, stride, site),
        OUT0=first,
        OUT1=second,
        OUT2=third,
        BLOCK=BLOCK_OUTPUTS,
        DTYPE=_TYPES[dtype],
        **constants,
        **_FIELDS,
        num_warps=4,
        num_stages=2,
        maxnreg=168,  # three programs a multiprocessor
    )


# A step's arrays begin where their bucket's upload has them: one kernel serves all places.
@triton.jit(do_not_specialize=["site"], do_not_specialize_on_alignment=["counts", "pairs"])
def shrink_kernel(
    x, counts, pairs, shrunk, stride, site,
    INPUTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SITE: tl.constexpr,
    PAIR: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Grid: (pairs, blocks of ranks, chunks); of the first two any number, taken in turn."""
    t_T, chunk = tl.arange(0, TOKENS), tl.program_id(2)
    for index in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        pair = pairs + index * PAIR
        start, count = tl.load(pair).to(tl.int32), tl.load(pair + 1).to(tl.int32)
        width = tl.load(pair + 5).to(tl.int32)
        entry = tl.load(pair + 2).to(tl.pointer_type(tl.int64)) + site * SITE
        a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x.dtype.element_ty)), 16)
        rank = tl.load(entry + 1).to(tl.int32)
        real_T = t_T < count
        for first in range(tl.program_id(1) * RANKS, rank, tl.num_programs(1) * RANKS):
            r_R = first + tl.arange(0, RANKS)
            sum_TR = tl.zeros((TOKENS, RANKS), tl.float32)
            for begin in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, INPUTS), BLOCK):
                i_I = begin + tl.arange(0, BLOCK)
                x_TI = tl.load(
                    x + (start + t_T)[:, None] * INPUTS + i_I[None, :],
                    mask=real_T[:, None] & (i_I < INPUTS)[None, :], other=0.0,
                )  # fmt: skip
                a_IR = tl.load(
                    a + r_R[None, :] * INPUTS + i_I[:, None],
                    mask=(r_R < rank)[None, :] & (i_I < INPUTS)[:, None], other=0.0,
                )  # fmt: skip
                sum_TR = tl.dot(x_TI, a_IR, sum_TR, input_precision="ieee")
            line_T = chunk.to(tl.int64) * stride + tl.load(pair + 4) + t_T * width
            mask_TR = real_T[:, None] & (r_R < rank)[None, :]
            tl.store(shrunk + line_T[:, None] + r_R[None, :], sum_TR, mask=mask_TR)


@triton.jit
def _load_b(b, n_N, r_R, rank, there_N):
    """[ranks, outputs] of B, 16 bytes at once where its rows begin on such."""
    if rank % 8 == 0:
        whole = rank // 8 * 8  # which tells the compiler what the condition says
        mask_RN = there_N[None, :] & (r_R < whole)[:, None]
        b_RN = tl.load(b + n_N[None, :] * whole + r_R[:, None], mask=mask_RN, other=0.0)
    else:
        mask_RN = there_N[None, :] & (r_R < rank)[:, None]
        b_RN = tl.load(b + n_N[None, :] * rank + r_R[:, None], mask=mask_RN, other=0.0)
    return b_RN


@triton.jit
def _scale(address):
    """The float64 whose bits an int64 holds."""
    return tl.load(address).to(tl.float64, bitcast=True)


@triton.jit(
    do_not_specialize=["site"],
    do_not_specialize_on_alignment=["source", "counts", "tiles", "pairs"],
)
def expand_kernel(
    source, counts, tiles, pairs, out, stride, site,
    OUT0: tl.constexpr, OUT1: tl.constexpr, OUT2: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, CHUNKS: tl.constexpr, VOCABULARY: tl.constexpr, SITE: tl.constexpr,
    TARGET: tl.constexpr, TILE: tl.constexpr, PAIR: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, blocks of outputs of all targets); of tiles any number, taken in turn.

    source: the workspace of `shrink`; with a VOCABULARY token ids, and the delta is added.
    """
    # Which target, and where in it: no block has outputs of two.
    blocks0: tl.constexpr = (OUT0 + BLOCK - 1) // BLOCK
    blocks1: tl.constexpr = (OUT1 + BLOCK - 1) // BLOCK
    block = tl.program_id(1)
    target = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    outputs = tl.where(target == 0, OUT0, tl.where(target == 1, OUT1, OUT2))
    column = tl.where(target == 0, 0, tl.where(target == 1, OUT0, OUT0 + OUT1))
    before = tl.where(target == 0, 0, tl.where(target == 1, blocks0, blocks0 + blocks1))
    n_N = (block - before) * BLOCK + tl.arange(0, BLOCK)
    t_T = tl.arange(0, TOKENS)
    for index in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        tile = tiles + index * TILE
        start, count = tl.load(tile), tl.load(tile + 1)
        real_T = t_T < count
        first_pair = tl.load(tile + 2)
        delta_TN = tl.zeros((TOKENS, BLOCK), tl.float32)
        for number in range(first_pair, first_pair + tl.load(tile + 3)):
            pair = pairs + number * PAIR
            site_entry = tl.load(pair + 2).to(tl.pointer_type(tl.int64)) + site * SITE
            entry = site_entry + 2 + target * TARGET
            rank = tl.load(entry + 2).to(tl.int32)
            b = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
            place, width = tl.load(pair + 4), tl.load(pair + 5).to(tl.int32)
            part_TN = tl.zeros((TOKENS, BLOCK), tl.float32)
            for first in range(0, rank, RANKS):
                r_R = first + tl.arange(0, RANKS)
                inside_TR = real_T[:, None] & (r_R < rank)[None, :]
                if VOCABULARY > 0:
                    a = tl.load(site_entry).to(tl.pointer_type(DTYPE))
                    token_T = tl.load(source + start + t_T, mask=real_T, other=0)
                    h_TR = tl.load(
                        a + r_R[None, :] * VOCABULARY + token_T[:, None], mask=inside_TR, other=0.0
                    )
                else:
                    own_R = tl.load(entry + 1).to(tl.int32) + r_R
                    h_TR = tl.zeros((TOKENS, RANKS), tl.float32)
                    for chunk in tl.static_range(CHUNKS):
                        line_T = place + t_T * width + stride.to(tl.int64) * chunk
                        h_TR += tl.load(
                            source + line_T[:, None] + own_R[None, :], mask=inside_TR, other=0.0
                        )
                b_RN = _load_b(b, n_N, r_R, rank, n_N < outputs)
                part_TN = tl.dot(h_TR.to(DTYPE), b_RN, part_TN, input_precision="ieee")
            if rank > 0:
                # One scale, rounded once: float32 may hold it and neither of the two.
                delta_TN += part_TN * (_scale(entry + 3) * _scale(pair + 3)).to(tl.float32)
        at_TN = (start + t_T).to(tl.int64)[:, None] * (OUT0 + OUT1 + OUT2) + (column + n_N)[None, :]
        keep_TN = real_T[:, None] & (n_N < outputs)[None, :]
        if VOCABULARY > 0:
            delta_TN += tl.load(out + at_TN, mask=keep_TN, other=0.0)
        tl.store(out + at_TN, delta_TN, mask=keep_TN)
