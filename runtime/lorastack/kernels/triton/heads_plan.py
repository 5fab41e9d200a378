"""Which (tree, head) pairs of a step share a matrix, laid out on the host for `heads`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from lorastack.kernels.heads import HeadsWeights

TILE = 16  # pairs of a tile


class Tile(NamedTuple):
    """`num_pairs` pairs first, first + stride, ... that share a matrix.

    matrix: its address: the first block's of one head, or an output [size, H]. bias: the first
    block's; 0 for outputs. stride: for states, the number of heads. blocks: of each head. size: of
    the matrix's outputs. a, b: the first block's of that head in a private part, which has a rank;
    0 without one.
    """

    matrix: int
    bias: int
    first: int
    stride: int
    num_pairs: int
    blocks: int
    size: int
    a: int = 0
    b: int = 0
    rank: int = 0


FIELDS = len(Tile._fields)


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

    @property
    def max_rank(self) -> int:
        """Of the private parts; 0 if there are none."""
        return max((tile.rank for tile in self.states), default=0)


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
        a = b = rank = 0
        if heads.private is not None:
            rank = heads.private.rank
            before = head * rank * hidden * weight.itemsize
            a = heads.private.a_LKRH.data_ptr() + before
            b = heads.private.b_LKHR.data_ptr() + before
        for places in _cut(pairs[head::num_heads]):
            tile = Tile(matrix, own, places.start, num_heads, len(places), num_blocks, hidden)
            yield tile._replace(a=a, b=b, rank=rank)


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
