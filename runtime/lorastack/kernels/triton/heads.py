"""What heads propose, on the device: states, logits of their outputs, and the best of each row.

Contract: `kernels.heads`. The host lays out, before the step, which (tree, head) pairs there are,
and in `Tile`s which of them share a matrix: up to TILE pairs whose places rise evenly. Matrices are
found by their addresses, so a launch serves any heads. Nobody relies on bits here: what heads
propose changes no token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.heads import HeadsWeights
from lorastack.kernels.triton.launch import launch
from lorastack.kernels.triton.ranks import id_of, key_of, rank_of

TILE = 16  # pairs of a tile
SPAN = 4096  # outputs of a pair that one program of `top_kernel` ranks
_BLOCK = 512  # of them at once: larger ones take long to compile


class Tile(NamedTuple):
    """Pairs first, first + stride, ... that share a matrix.

    matrix: its address: the first block's of one head, or an output [size, H]. bias: the first
    block's; 0 for outputs. stride: for states, the number of heads. blocks: of each head. size: of
    the matrix's outputs.
    """

    matrix: int
    bias: int
    first: int
    stride: int
    count: int
    blocks: int
    size: int


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

    hidden_XH, r_LYH: contiguous, of the heads' dtype. ends_B: int32, where in hidden_XH each tree's
    state stands. num_blocks: at most L, and no heads have more. One launch a block.
    """
    hidden = hidden_XH.shape[1]
    sizes = _sizes(hidden_XH)
    for block in range(num_blocks):
        launch(
            *(states_kernel, (max_tiles, triton.cdiv(hidden, sizes["BLOCK_O"]))),
            *(hidden_XH, ends_B, pairs.states_GF, pairs.tree_Y, r_LYH, r_LYH.stride(0)),
            *(pairs.counts, block),
            **sizes,
            FIRST=block == 0,
        )


def logits(r_LYH: Tensor, pairs: Pairs, logits_YN: Tensor, max_tiles: int) -> None:
    """Fills logits_YN, float32, N at least that of all heads, with what `states` has made."""
    sizes = _sizes(r_LYH)
    launch(
        *(logits_kernel, (max_tiles, triton.cdiv(logits_YN.shape[1], sizes["BLOCK_O"]))),
        *(r_LYH, r_LYH.stride(0), pairs.outputs_GF, logits_YN, logits_YN.stride(0), pairs.counts),
        **sizes,
    )


def _sizes(x_TH: Tensor) -> dict[str, int]:
    hidden = x_TH.shape[-1]
    width = min(128 if x_TH.itemsize == 2 else 64, max(16, triton.next_power_of_2(hidden)))
    return {
        "HIDDEN": hidden,
        "TILE": TILE,
        "BLOCK_O": min(64, width),
        "BLOCK_I": width,
        "num_warps": 4,
        "num_stages": 3,
    }


class Ranked(NamedTuple):
    """Workspace of `top`, for S spans of SPAN outputs: keys_YSR int64, R a power of two and at
    least num; weights_YS3 float32."""

    keys_YSR: Tensor
    weights_YS3: Tensor


def num_spans(num_outputs: int) -> int:
    """S of `Ranked`."""
    return -(-num_outputs // SPAN)


def top(
    logits_YN: Tensor,
    pairs: Pairs,
    ranked: Ranked,
    ids_YR: Tensor,
    logprobs_YR: Tensor,
    bucket: int,
) -> None:
    """Fills ids_YR, int32, and logprobs_YR, float32, of equal strides, for at most `bucket` pairs."""
    num_spans, rank = ranked.keys_YSR.shape[1:]
    launch(
        *(rank_kernel, (bucket, num_spans), logits_YN, logits_YN.stride(0), pairs.num_outputs_Y),
        *(pairs.counts, *ranked),
        RANK=rank,
        SPAN=SPAN,
        BLOCK=max(_BLOCK, 2 * rank),
        num_warps=4,
    )
    launch(
        *(
            top_kernel,
            (bucket,),
            logits_YN,
            logits_YN.stride(0),
            pairs.ids_Y,
            pairs.counts,
            *ranked,
        ),
        *(num_spans, ids_YR, logprobs_YR, ids_YR.stride(0), ids_YR.shape[1]),
        RANK=rank,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["r_stride", "block"])
def states_kernel(
    hidden,
    ends,
    tiles,
    trees,
    r,
    r_stride,
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
    tiles += tl.program_id(0) * 7
    if block >= tl.load(tiles + 5):
        return
    pairs, real, num_heads = _pairs_of(tiles, TILE)
    r += block.to(tl.int64) * r_stride
    if FIRST:
        x = (
            hidden
            + tl.load(ends + tl.load(trees + pairs, mask=real, other=0)).to(tl.int64) * HIDDEN
        )
    else:
        x = r - r_stride + pairs * HIDDEN
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


@triton.jit(do_not_specialize=["r_stride", "stride"])
def logits_kernel(
    r,
    r_stride,
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
    tiles += tl.program_id(0) * 7
    size = tl.load(tiles + 6)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if tl.program_id(1) * BLOCK_O >= size:
        return
    pairs, real, _ = _pairs_of(tiles, TILE)
    x = r + (tl.load(tiles + 5) - 1) * r_stride + pairs * HIDDEN
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


@triton.jit(do_not_specialize=["stride"])
def rank_kernel(
    logits,
    stride,
    num_outputs,
    counts,
    keys,
    weights,
    RANK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: pairs, spans. A span's best keys; its best logit, the weight of all beside it, and how
    many are not finite."""
    pair = tl.program_id(0).to(tl.int64)
    if pair >= tl.load(counts + 2):
        return
    size = tl.load(num_outputs + pair)
    logits += pair * stride
    held = tl.zeros((RANK,), tl.uint64)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    odd = tl.zeros((), tl.float32)
    first = tl.program_id(1) * SPAN
    for begin in range(first, tl.minimum(first + SPAN, size), BLOCK):
        places = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < size, other=float("-inf"))
        odd += tl.sum(
            ((places < size) & ((x != x) | (tl.abs(x) == float("inf")))).to(tl.float32), 0
        )
        x = tl.where(x != x, float("-inf"), x)
        block_keys = tl.where(places < size, key_of(rank_of(x), places), 0)
        if tl.max(block_keys, 0) > tl.min(held, 0):
            held = tl.topk(tl.interleave(held, tl.topk(block_keys, RANK)), RANK)
        most = tl.maximum(peak, tl.max(x, 0))
        safe = tl.where(tl.abs(most) == float("inf"), 0.0, most)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(x - safe), 0)
        peak = most
    row = pair * tl.num_programs(1) + tl.program_id(1)
    tl.store(keys + row * RANK + tl.arange(0, RANK), held.to(tl.int64, bitcast=True))
    tl.store(weights + row * 3, peak)
    tl.store(weights + row * 3 + 1, total)
    tl.store(weights + row * 3 + 2, odd)


@triton.jit(do_not_specialize=["stride", "spans", "out_stride", "num"])
def top_kernel(
    logits,
    stride,
    ids,
    counts,
    keys,
    weights,
    spans,
    out_ids,
    out_logprobs,
    out_stride,
    num,
    RANK: tl.constexpr,
):
    """Grid: pairs. Joins the spans."""
    pair = tl.program_id(0).to(tl.int64)
    if pair >= tl.load(counts + 2):
        return
    logits += pair * stride
    keys += pair * spans * RANK
    weights += pair * spans * 3
    i = tl.arange(0, RANK)
    held = tl.load(keys + i).to(tl.uint64, bitcast=True)
    peak, total, odd = tl.load(weights), tl.load(weights + 1), tl.load(weights + 2)
    for span in range(1, spans):
        others = tl.load(keys + span * RANK + i).to(tl.uint64, bitcast=True)
        held = tl.topk(tl.interleave(held, others), RANK)
        own = tl.load(weights + span * 3)
        most = tl.maximum(peak, own)
        safe = tl.where(tl.abs(most) == float("inf"), 0.0, most)
        total = total * tl.exp(peak - safe) + tl.load(weights + span * 3 + 1) * tl.exp(own - safe)
        peak = most
        odd += tl.load(weights + span * 3 + 2)
    places = id_of(tl.where(held == 0, tl.max(held, 0), held))
    logprobs = tl.load(logits + places) - peak - tl.log(total)
    logprobs = tl.where(odd > 0, float("nan"), logprobs)
    out_ids += pair * out_stride
    address = tl.load(ids + pair)
    if address != 0:
        places = tl.load(address.to(tl.pointer_type(tl.int64)) + places)
    tl.store(out_ids + i, places.to(tl.int32), mask=i < num)
    tl.store(out_logprobs + pair * out_stride + i, logprobs, mask=i < num)
