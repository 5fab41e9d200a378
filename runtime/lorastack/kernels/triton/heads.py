"""Heads on the device: states, and logits of their outputs, of which `top` takes the best.

Contract: `kernels.heads`. The host lays out, before the step, which (tree, head) pairs there are,
and in `Tile`s which of them share a matrix: up to TILE pairs whose places rise evenly. Matrices are
found by their addresses, so a launch serves any heads, with private parts and without. Tiles of one
matrix under several private parts run side by side and find it in the cache. Nobody relies on bits
here: what heads propose changes no token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.heads_plan import FIELDS, TILE, Pairs
from lorastack.kernels.triton.launch import cdiv, launch, power_of_two

RANKS = 16  # of a private part that are multiplied at once
CHUNK = 1024  # inputs that are summed before chunks are, where few programs have all of them


def states(
    hidden_XH: Tensor,
    ends_B: Tensor,
    pairs: Pairs,
    r_LYH: Tensor,
    max_tiles: int,
    num_blocks: int,
    max_rank: int,
) -> None:
    """Fills r_LYH: a pair's state after each of its blocks, of which the last serves.

    hidden_XH, r_LYH: contiguous, of the heads' dtype; Y has room for all pairs. ends_B: int32,
    where in hidden_XH each tree's state stands. num_blocks: at most L, and no heads have more.
    max_rank: of private parts, 0 without any. One launch a block, with private parts two.
    """
    hidden, room = hidden_XH.shape[1], r_LYH.shape[1]
    constants = sizes(hidden, hidden_XH.itemsize)
    chunks = cdiv(hidden, CHUNK) if max_rank else 0
    size = (chunks, room, max_rank)
    shrunk_CYR = torch.empty(size, dtype=torch.float32, device=r_LYH.device) if max_rank else None
    for block in range(num_blocks):
        inputs = (
            *(hidden_XH, ends_B, pairs.states_GF, pairs.tree_Y, r_LYH, room),
            *(pairs.counts, block, shrunk_CYR, max_rank),
        )
        if max_rank:
            launch(
                *(shrink_kernel, (max_tiles, cdiv(max_rank, RANKS), chunks), *inputs),
                **constants | {"BLOCK_O": RANKS, "BLOCK_I": min(constants["BLOCK_I"], CHUNK)},
                FIRST=block == 0,
                CHUNK=CHUNK,
            )
        launch(
            *(states_kernel, (max_tiles, cdiv(hidden, constants["BLOCK_O"])), *inputs),
            **constants,
            FIRST=block == 0,
            CHUNKS=chunks,
            RANKS=RANKS,
        )


def logits(r_LYH: Tensor, pairs: Pairs, logits_YN: Tensor, max_tiles: int) -> None:
    """Fills logits_YN, float32, N at least that of all heads, with what `states` has made."""
    constants = sizes(r_LYH.shape[2], r_LYH.itemsize)
    launch(
        *(logits_kernel, (max_tiles, cdiv(logits_YN.shape[1], constants["BLOCK_O"]))),
        *(r_LYH, r_LYH.shape[1], pairs.outputs_GF, logits_YN, logits_YN.stride(0), pairs.counts),
        **constants,
    )


def sizes(hidden: int, itemsize: int) -> dict[str, Any]:
    """Constants and settings of the two products. itemsize: bytes of a number of theirs."""
    inputs = min(256 // itemsize, max(16, power_of_two(hidden)))
    return {
        "HIDDEN": hidden,
        "FIELDS": FIELDS,
        "TILE": TILE,
        "BLOCK_O": min(64, inputs),
        "BLOCK_I": inputs,
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit(do_not_specialize=["room", "block", "width"])
def shrink_kernel(
    hidden,
    ends,
    tiles,
    trees,
    r,
    room,
    counts,
    block,
    shrunk,
    width,
    FIRST: tl.constexpr,
    HIDDEN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: tiles, runs of BLOCK_O ranks, chunks of inputs. What private parts of one block make of
    a chunk."""
    if tl.program_id(0) >= tl.load(counts):
        return
    tiles += tl.program_id(0) * FIELDS
    rank = tl.load(tiles + 9)
    first = tl.program_id(1) * BLOCK_O
    if (block >= tl.load(tiles + 5)) | (first >= rank):
        return
    pairs, real, num_heads = _pairs_of(tiles, TILE)
    x = _inputs_of(hidden, ends, trees, r, room, block, pairs, real, FIRST, HIDDEN)
    done = block.to(tl.int64) * num_heads  # matrices of the blocks before
    a = _matrix(tl.load(tiles + 7), hidden.dtype, HIDDEN) + done * rank * HIDDEN
    o = first + tl.arange(0, BLOCK_O)
    chunk = tl.program_id(2)
    product = _product(a, x, o, rank, chunk * CHUNK, CHUNK, HIDDEN, TILE, BLOCK_O, BLOCK_I)
    lines = (chunk.to(tl.int64) * room + pairs) * width
    both = (o < rank)[:, None] & real[None, :]
    tl.store(shrunk + lines[None, :] + o[:, None], product, mask=both)


@triton.jit(do_not_specialize=["room", "block", "width"])
def states_kernel(
    hidden,
    ends,
    tiles,
    trees,
    r,
    room,
    counts,
    block,
    shrunk,
    width,
    FIRST: tl.constexpr,
    HIDDEN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Grid: tiles, runs of BLOCK_O outputs. One block of heads. CHUNKS: 0 without private parts."""
    if tl.program_id(0) >= tl.load(counts):
        return
    tiles += tl.program_id(0) * FIELDS
    if block >= tl.load(tiles + 5):
        return
    pairs, real, num_heads = _pairs_of(tiles, TILE)
    x = _inputs_of(hidden, ends, trees, r, room, block, pairs, real, FIRST, HIDDEN)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    done = block.to(tl.int64) * num_heads  # matrices of the blocks before
    weight = _matrix(tl.load(tiles), hidden.dtype, HIDDEN) + done * HIDDEN * HIDDEN
    bias = tl.load(tiles + 1).to(hidden.dtype) + done * HIDDEN
    z = _product(weight, x, o, HIDDEN, 0, HIDDEN, HIDDEN, TILE, BLOCK_O, BLOCK_I)
    z += tl.load(bias + o, mask=o < HIDDEN, other=0).to(tl.float32)[:, None]
    if CHUNKS > 0:
        rank = tl.load(tiles + 9).to(tl.int32)
        b = tl.load(tiles + 8).to(hidden.dtype) + done * HIDDEN * rank
        lines = shrunk + pairs * width
        chunk = room.to(tl.int64) * width
        z += _expanded(b, lines, chunk, o, rank, HIDDEN, TILE, BLOCK_O, CHUNKS, RANKS)
    r += block.to(tl.int64) * room * HIDDEN
    both = (o < HIDDEN)[:, None] & real[None, :]
    own = tl.load(x[None, :] + o[:, None], mask=both, other=0).to(tl.float32)
    own += z / (1 + tl.exp(-z))
    tl.store(r + (pairs * HIDDEN)[None, :] + o[:, None], own, mask=both)


@triton.jit(do_not_specialize=["room", "stride"])
def logits_kernel(
    r,
    room,
    tiles,
    logits,
    stride,
    counts,
    HIDDEN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Grid: tiles, runs of BLOCK_O outputs."""
    if tl.program_id(0) >= tl.load(counts + 1):
        return
    tiles += tl.program_id(0) * FIELDS
    size = tl.load(tiles + 6)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if tl.program_id(1) * BLOCK_O >= size:
        return
    pairs, real, _ = _pairs_of(tiles, TILE)
    x = r + ((tl.load(tiles + 5) - 1) * room + pairs) * HIDDEN
    output = _matrix(tl.load(tiles), r.dtype, HIDDEN)
    product = _product(output, x, o, size, 0, HIDDEN, HIDDEN, TILE, BLOCK_O, BLOCK_I)
    both = (o < size)[:, None] & real[None, :]
    tl.store(logits + (pairs * stride)[None, :] + o[:, None], product, mask=both)


@triton.jit
def _pairs_of(tile, TILE: tl.constexpr):
    """A tile's pairs, the first one in place of those missing; which are real; their stride."""
    i = tl.arange(0, TILE)
    real = i < tl.load(tile + 4)
    stride = tl.load(tile + 3)
    return tl.load(tile + 2) + tl.where(real, i, 0) * stride, real, stride


@triton.jit
def _inputs_of(
    hidden,
    ends,
    trees,
    r,
    room,
    block,
    pairs,
    real,
    FIRST: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Where the states of pairs stand before a block."""
    if FIRST:
        end = tl.load(ends + tl.load(trees + pairs, mask=real, other=0))
        x = hidden + end.to(tl.int64) * HIDDEN
    else:
        x = r + ((block.to(tl.int64) - 1) * room + pairs) * HIDDEN
    return x


@triton.jit
def _matrix(address, pointer: tl.constexpr, HIDDEN: tl.constexpr):
    """Its pointer. Buffers are aligned, so that rows are where their sizes are."""
    matrix = address.to(pointer)
    if HIDDEN % 16 == 0:
        matrix = tl.multiple_of(matrix, 16)
    return matrix


@triton.jit
def _product(
    matrix,
    x,
    o,
    size,
    start,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Rows o of matrix [size, HIDDEN] times the rows at x, [BLOCK_O, TILE] in float32: INPUTS
    inputs from `start` on."""
    total = tl.zeros((BLOCK_O, TILE), tl.float32)
    rows = matrix + o.to(tl.int64) * HIDDEN
    for begin in range(0, INPUTS, BLOCK_I):
        i = start + begin + tl.arange(0, BLOCK_I)
        inside = (o < size)[:, None] & (i < HIDDEN)[None, :]
        weight = tl.load(rows[:, None] + i[None, :], mask=inside, other=0)
        inputs = tl.load(x[None, :] + i[:, None], mask=(i < HIDDEN)[:, None], other=0)
        total = tl.dot(weight, inputs, total, input_precision="ieee")
    return total


@triton.jit
def _expanded(
    b,
    lines,
    chunk,
    o,
    rank,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Rows o of b [HIDDEN, rank] times what `shrink_kernel` left at `lines`, `chunk` apart."""
    total = tl.zeros((BLOCK_O, TILE), tl.float32)
    for first in range(0, rank, RANKS):
        i = first + tl.arange(0, RANKS)
        inside = (o < HIDDEN)[:, None] & (i < rank)[None, :]
        weight = tl.load(b + (o * rank)[:, None] + i[None, :], mask=inside, other=0)
        inputs = tl.zeros((RANKS, TILE), tl.float32)
        for index in tl.static_range(CHUNKS):
            part = lines[None, :] + index * chunk + i[:, None]
            inputs += tl.load(part, mask=(i < rank)[:, None], other=0.0)
        total = tl.dot(weight, inputs.to(weight.dtype), total, input_precision="ieee")
    return total
