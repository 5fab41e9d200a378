"""What heads propose, on the device: states, logits of their outputs, and the best of each row.

Contract: `kernels.heads`. The host lays out, before the step, which (tree, head) pairs there are,
and in `Tile`s which of them share a matrix: up to TILE pairs whose places rise evenly. Matrices are
found by their addresses, so a launch serves any heads. Nobody relies on bits here: what heads
propose changes no token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.heads import HeadsWeights
from lorastack.kernels.triton.launch import cdiv, launch, power_of_two
from lorastack.kernels.triton.ranks import BEHIND_ALL, key_of, limit_of, rank_of
from lorastack.layout import MAX_RANK

TILE = 16  # pairs of a tile
BLOCK = 2048  # outputs of a pair that are ranked at once


class Tile(NamedTuple):
    """`num_pairs` pairs first, first + stride, ... that share a matrix.

    matrix: its address: the first block's of one head, or an output [size, H]. bias: the first
    block's; 0 for outputs. stride: for states, the number of heads. blocks: of each head. size: of
    the matrix's outputs.
    """

    matrix: int
    bias: int
    first: int
    stride: int
    num_pairs: int
    blocks: int
    size: int


_FIELDS = tl.constexpr(len(Tile._fields))


class Layout(NamedTuple):
    """A step's pairs Y in plain numbers, ready to be uploaded.

    tree_Y: whose end each pair starts from. num_outputs_Y. ids_Y: address of the outputs' ids,
    int64; 0: places are ids.
    """

    states: list[Tile]
    outputs: list[Tile]
    tree_Y: list[int]
    num_outputs_Y: list[int]
    ids_Y: list[int]


class Pairs(NamedTuple):
    """The same on the device, with room for more. states_GF, outputs_GF: int64, a tile a row.
    tree_Y, num_outputs_Y: int32. ids_Y: int64. counts: int32 [3], tiles of states, tiles of
    outputs, pairs."""

    states_GF: Tensor
    outputs_GF: Tensor
    tree_Y: Tensor
    num_outputs_Y: Tensor
    ids_Y: Tensor
    counts: Tensor


def lay_out(groups: Sequence[tuple[HeadsWeights, Sequence[int]]]) -> Layout:
    """Each group's heads, and the trees that use them. Pairs are ordered by (tree, head), group
    after group. Heads without outputs get no tile of them: `states` alone serves."""
    layout = Layout([], [], [], [], [])
    for heads, trees in groups:
        pairs = range(len(layout.tree_Y), len(layout.tree_Y) + len(trees) * heads.num_heads)
        layout.tree_Y.extend(tree for tree in trees for _ in range(heads.num_heads))
        layout.states.extend(_state_tiles(heads, pairs))
        num_outputs, ids = 0, 0
        if heads.output is not None:
            layout.outputs.extend(_output_tiles(heads, heads.output, pairs))
            num_outputs = heads.output.shape[-2]
        if heads.ids_N is not None:
            ids = heads.ids_N.data_ptr()
        layout.num_outputs_Y.extend([num_outputs] * len(pairs))
        layout.ids_Y.extend([ids] * len(pairs))
    return layout


def _state_tiles(heads: HeadsWeights, pairs: range) -> Iterator[Tile]:
    weight, bias = heads.weight_LKHH, heads.bias_LKH
    num_blocks, num_heads, hidden = bias.shape
    for head in range(num_heads):
        matrix = weight.data_ptr() + head * hidden * hidden * weight.itemsize
        own = bias.data_ptr() + head * hidden * bias.itemsize
        for places in _cut(pairs[head::num_heads]):
            yield Tile(matrix, own, places.start, num_heads, len(places), num_blocks, hidden)


def _output_tiles(heads: HeadsWeights, output: Tensor, pairs: range) -> Iterator[Tile]:
    """One matrix for all pairs, or one a head."""
    num_matrices = 1 if output.dim() == 2 else heads.num_heads
    num_blocks, size = len(heads.bias_LKH), output.shape[-2]
    nbytes = output.nbytes // num_matrices
    for head in range(num_matrices):
        matrix = output.data_ptr() + head * nbytes
        for places in _cut(pairs[head::num_matrices]):
            yield Tile(matrix, 0, places.start, num_matrices, len(places), num_blocks, size)


def _cut(pairs: range) -> Iterator[range]:
    return (pairs[start : start + TILE] for start in range(0, len(pairs), TILE))


def states(
    hidden_XH: Tensor, ends_B: Tensor, pairs: Pairs, r_LYH: Tensor, max_tiles: int, num_blocks: int
) -> None:
    """Fills r_LYH: a pair's state after each of its blocks, of which the last serves.

    hidden_XH, r_LYH: contiguous, of the heads' dtype; Y has room for all pairs. ends_B: int32,
    where in hidden_XH each tree's state stands. num_blocks: at most L, and no heads have more. One
    launch a block.
    """
    hidden = hidden_XH.shape[1]
    constants = sizes(hidden, hidden_XH.itemsize)
    for block in range(num_blocks):
        launch(
            *(states_kernel, (max_tiles, cdiv(hidden, constants["BLOCK_O"]))),
            *(hidden_XH, ends_B, pairs.states_GF, pairs.tree_Y, r_LYH, r_LYH.shape[1]),
            *(pairs.counts, block),
            **constants,
            FIRST=block == 0,
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
        "TILE": TILE,
        "BLOCK_O": min(64, inputs),
        "BLOCK_I": inputs,
        "num_warps": 4,
        "num_stages": 3,
    }


def top(logits_YN: Tensor, pairs: Pairs, ids_YR: Tensor, logprobs_YR: Tensor, bucket: int) -> None:
    """Fills ids_YR, int32, and logprobs_YR, float32, of at most `bucket` pairs with R tokens each.

    R: at most MAX_RANK, for which there is one kernel. Both have equal strides.
    """
    num = ids_YR.shape[1]
    assert num <= MAX_RANK, "more tokens than the kernel ranks"
    launch(
        *(top_kernel, (bucket,), logits_YN, logits_YN.stride(0), pairs.num_outputs_Y, pairs.ids_Y),
        *(pairs.counts, ids_YR, logprobs_YR, ids_YR.stride(0), num),
        RANK=MAX_RANK,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["room", "block"])
def states_kernel(
    hidden,
    ends,
    tiles,
    trees,
    r,
    room,
    counts,
    block,
    FIRST: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Grid: tiles, runs of BLOCK_O outputs. One block of heads."""
    if tl.program_id(0) >= tl.load(counts):
        return
    tiles += tl.program_id(0) * _FIELDS
    if block >= tl.load(tiles + 5):
        return
    pairs, real, num_heads = _pairs_of(tiles, TILE)
    r += block.to(tl.int64) * room * HIDDEN
    if FIRST:
        x = (
            hidden
            + tl.load(ends + tl.load(trees + pairs, mask=real, other=0)).to(tl.int64) * HIDDEN
        )
    else:
        x = r + (pairs - room) * HIDDEN
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    done = block.to(tl.int64) * num_heads  # matrices of the blocks before
    weight = _matrix(tl.load(tiles), hidden.dtype, HIDDEN) + done * HIDDEN * HIDDEN
    bias = tl.load(tiles + 1).to(hidden.dtype) + done * HIDDEN
    z = _product(weight, x, o, HIDDEN, HIDDEN, TILE, BLOCK_O, BLOCK_I)
    z += tl.load(bias + o, mask=o < HIDDEN, other=0).to(tl.float32)[:, None]
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
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Grid: tiles, runs of BLOCK_O outputs."""
    if tl.program_id(0) >= tl.load(counts + 1):
        return
    tiles += tl.program_id(0) * _FIELDS
    size = tl.load(tiles + 6)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if tl.program_id(1) * BLOCK_O >= size:
        return
    pairs, real, _ = _pairs_of(tiles, TILE)
    x = r + ((tl.load(tiles + 5) - 1) * room + pairs) * HIDDEN
    output = _matrix(tl.load(tiles), r.dtype, HIDDEN)
    product = _product(output, x, o, size, HIDDEN, TILE, BLOCK_O, BLOCK_I)
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
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Rows o of matrix [size, HIDDEN] times the rows at x, [BLOCK_O, TILE] in float32."""
    total = tl.zeros((BLOCK_O, TILE), tl.float32)
    rows = matrix + o.to(tl.int64) * HIDDEN
    for begin in range(0, HIDDEN, BLOCK_I):
        i = begin + tl.arange(0, BLOCK_I)
        inside = (o < size)[:, None] & (i < HIDDEN)[None, :]
        weight = tl.load(rows[:, None] + i[None, :], mask=inside, other=0)
        inputs = tl.load(x[None, :] + i[:, None], mask=(i < HIDDEN)[:, None], other=0)
        total = tl.dot(weight, inputs, total, input_precision="ieee")
    return total


# Results stand anywhere: one kernel serves all places.
@triton.jit(
    do_not_specialize=["stride", "out_stride", "num"],
    do_not_specialize_on_alignment=["out_ids", "out_logprobs"],
)
def top_kernel(
    logits,
    stride,
    num_outputs,
    tokens,
    counts,
    out_ids,
    out_logprobs,
    out_stride,
    num,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: pairs. Finds the best places in any order, and then their order."""
    pair = tl.program_id(0).to(tl.int64)
    if pair >= tl.load(counts + 2):
        return
    logits += pair * stride
    out_ids += pair * out_stride
    out_logprobs += pair * out_stride
    size = tl.load(num_outputs + pair)
    found = tl.minimum(num, size)
    limit = tl.full((), BEHIND_ALL, tl.uint64)
    if found < size:
        limit = limit_of(logits, found, size, BLOCK)
    peak, total = _collect(logits, limit, size, out_ids, BLOCK)
    tl.debug_barrier()
    i = tl.arange(0, RANK)
    places = tl.load(out_ids + i, mask=i < found, other=0).to(tl.int64)
    x = tl.load(logits + places, mask=i < found, other=0.0)
    logprobs = x - peak - total
    keys = tl.where(i < found, key_of(rank_of(x), places), BEHIND_ALL)
    order = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), 1)
    address = tl.load(tokens + pair)
    if address != 0:
        places = tl.load(address.to(tl.pointer_type(tl.int64)) + places, mask=i < found, other=0)
    tl.debug_barrier()
    tl.store(out_ids + order, places.to(tl.int32), mask=i < found)
    tl.store(out_logprobs + order, logprobs, mask=i < found)
    # The best stands for what is missing.
    best = tl.sum(tl.where(order == 0, places, 0), 0)
    logprob = tl.sum(tl.where(order == 0, logprobs, 0.0), 0)
    missing = (i >= found) & (i < num)
    tl.store(out_ids + i, tl.where(missing, best, 0).to(tl.int32), mask=missing)
    tl.store(out_logprobs + i, tl.where(missing, logprob, 0.0), mask=missing)


@triton.jit
def _collect(logits, limit, size, out, BLOCK: tl.constexpr):
    """Writes the places whose keys are above `limit`. The best logit, and the logarithm of the sum
    of all e^(logit - best), NaN where a logit is not finite."""
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    odd = tl.zeros((), tl.int32)
    num = tl.zeros((), tl.int32)
    for begin in range(0, size, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        real = places < size
        x = tl.load(logits + places, mask=real, other=float("-inf"))
        keys = tl.where(real, key_of(rank_of(x), places), BEHIND_ALL)
        if tl.max(keys, 0) > limit:
            above = (keys > limit).to(tl.int32)
            tl.store(out + num + tl.cumsum(above, 0) - 1, places, mask=above > 0)
            num += tl.sum(above, 0)
        finite = tl.abs(x) < float("inf")
        odd += tl.sum((real & (finite == 0)).to(tl.int32), 0)
        x = tl.where(finite, x, float("-inf"))
        most = tl.maximum(peak, tl.max(x, 0))
        safe = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(x - safe), 0)
        peak = most
    return peak, tl.where(odd > 0, float("nan"), tl.log(total))
