"""What heads propose, on the device: states, logits of their outputs, and the best of each row.

Contract: `kernels.heads`. The host lays out, before the step, which (tree, head) pairs there are,
and in `Tile`s which of them share a matrix: up to TILE pairs whose places rise evenly. Matrices are
found by their addresses, so a launch serves any heads. Nobody relies on bits here: what heads
propose changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.heads import HeadsWeights
from lorastack.kernels.triton.launch import INTERPRETED, launch
from lorastack.kernels.triton.ranks import BEHIND_ALL, id_of, key_of, rank_of

TILE = 16  # pairs of a tile
SPAN = 4096  # outputs of a pair that one program of `top_kernel` ranks
_BLOCK = 512  # of them at once: larger ones take long to compile


class Tile(NamedTuple):
    """Pairs first, first + stride, ... that share a matrix.

    For states: matrix, bias: addresses of the first block's of one head; size: its blocks; stride
    is the number of heads. For outputs: matrix: address of [size, H]; bias is not used.
    """

    matrix: int
    bias: int
    first: int
    stride: int
    count: int
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
    after group. Groups without outputs get no tile of them: `states` alone serves."""
    layout = Layout([], [], [], [], [])
    for heads, trees in groups:
        first, num_heads = len(layout.tree_Y), heads.num_heads
        num_pairs = len(trees) * num_heads
        layout.tree_Y.extend(tree for tree in trees for _ in range(num_heads))
        num_blocks, _, hidden = heads.bias_LKH.shape
        bias, weight = heads.bias_LKH, heads.weight_LKHH
        for head in range(num_heads):
            matrix = weight.data_ptr() + head * hidden * hidden * weight.itemsize
            own = bias.data_ptr() + head * hidden * bias.itemsize
            end = first + num_pairs
            layout.states.extend(_tiles(matrix, own, first + head, end, num_heads, num_blocks))
        if heads.output is not None:
            layout.outputs.extend(_output_tiles(heads.output, first, num_pairs, num_heads))
        num_outputs = 0 if heads.output is None else heads.output.shape[-2]
        layout.num_outputs_Y.extend([num_outputs] * num_pairs)
        ids = 0 if heads.ids_N is None else heads.ids_N.data_ptr()
        layout.ids_Y.extend([ids] * num_pairs)
    return layout


def _output_tiles(output: Tensor, first: int, num_pairs: int, num_heads: int) -> list[Tile]:
    """One matrix for all pairs, or one a head."""
    address, end, size = output.data_ptr(), first + num_pairs, output.shape[-2]
    if output.dim() == 2:
        return _tiles(address, 0, first, end, 1, size)
    nbytes = output[0].numel() * output.itemsize
    return [
        tile
        for head in range(num_heads)
        for tile in _tiles(address + head * nbytes, 0, first + head, end, num_heads, size)
    ]


def _tiles(matrix: int, bias: int, first: int, end: int, stride: int, size: int) -> list[Tile]:
    places = range(first, end, stride)
    return [
        Tile(matrix, bias, places[start], stride, len(places[start : start + TILE]), size)
        for start in range(0, len(places), TILE)
    ]


def states(
    hidden_XH: Tensor, ends_B: Tensor, pairs: Pairs, r_LYH: Tensor, max_tiles: int, num_blocks: int
) -> None:
    """Fills r_LYH: after each block of a head, its state; the last one serves.

    hidden_XH, r_LYH: contiguous, of the heads' dtype. ends_B: int32, where in hidden_XH each tree's
    state stands. num_blocks: at most L, at least that of all heads. One launch a block.
    """
    hidden = hidden_XH.shape[1]
    outputs, inputs = _blocks(hidden)
    for block in range(num_blocks):
        launch(
            *(states_kernel, (max_tiles, -(-hidden // outputs)), hidden_XH, ends_B),
            *(pairs.states_GF, pairs.tree_Y, r_LYH, r_LYH.stride(0), pairs.counts, block),
            HIDDEN=hidden,
            TILE=TILE,
            BLOCK_O=outputs,
            BLOCK_I=inputs,
            num_warps=4,
            num_stages=3,
        )


def logits(r_LYH: Tensor, pairs: Pairs, logits_YN: Tensor, max_tiles: int) -> None:
    """Fills logits_YN, float32, N at least that of all heads."""
    hidden, columns = r_LYH.shape[2], logits_YN.shape[1]
    outputs, inputs = _blocks(hidden)
    launch(
        *(logits_kernel, (max_tiles, -(-columns // outputs)), r_LYH, r_LYH.stride(0)),
        *(pairs.blocks_Y,),
        HIDDEN=hidden,
    )
