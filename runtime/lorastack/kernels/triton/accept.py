"""Which nodes of a step's trees are accepted, and their KV moved, with no host in between.

Contracts: the match rule of `speculation.accept`, and `model.kv.Move`. A program a tree descends
it; then a program a tree and layer moves what was accepted behind the root, in place: a node's slot
is never below the one that it moves to, and both rise.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.launch import launch, power_of_two


class Trees(NamedTuple):
    """The step's trees on the device, int32.

    first_B: the root's output; the tree's other nodes follow. size_B: its nodes, the root included.
    token_X, parent_X: of an output that is a node, its token and its parent's place in the tree, -1
    for the root. num_trees: [1].
    """

    first_B: Tensor
    size_B: Tensor
    token_X: Tensor
    parent_X: Tensor
    num_trees: Tensor


class Accepted(NamedTuple):
    """int32. lengths_B: of the paths, the root left out. ends_B: the output of the path's end.
    path_X: as in `speculation.accept`, each tree's from its first output on."""

    lengths_B: Tensor
    ends_B: Tensor
    path_X: Tensor


class Slots(NamedTuple):
    """Where the trees' KV lies, int32. pages: tables of pages, one behind the other. table_B: where
    a tree's begins. committed_B: the logical slot of its root."""

    pages: Tensor
    table_B: Tensor
    committed_B: Tensor


def accept(tokens_X: Tensor, trees: Trees, out: Accepted, bucket: int, max_nodes: int) -> None:
    """Fills `out` for at most `bucket` trees.

    tokens_X: int32, sampled at each output. max_nodes: of a tree, a power of two.
    """
    launch(
        *(accept_kernel, (bucket,), tokens_X, *trees, *out),
        NODES=max_nodes,
        num_warps=1,
    )


def move_kv(kv: Tensor, accepted: Accepted, slots: Slots, trees: Trees, bucket: int) -> None:
    """kv: [num_layers, num_pages, 2, num_kv_heads, page_size, D], contiguous."""
    num_layers, num_pages, _, num_kv_heads, page_size, head_dim = kv.shape
    launch(
        *(move_kernel, (bucket, num_layers), kv, accepted.lengths_B, accepted.path_X),
        *(trees.first_B, *slots, trees.num_trees, num_pages),
        PAGE=page_size,
        SIDES=2 * num_kv_heads,
        SIZE=head_dim,
        BLOCK_SIDES=power_of_two(2 * num_kv_heads),
        BLOCK_SIZE=power_of_two(head_dim),
        num_warps=4,
    )


@triton.jit
def accept_kernel(
    sampled,
    first_B,
    size_B,
    token_X,
    parent_X,
    num_trees,
    lengths,
    ends,
    paths,
    NODES: tl.constexpr,
):
    """Grid: trees."""
    tree = tl.program_id(0)
    if tree >= tl.load(num_trees):
        return
    first = tl.load(first_B + tree)
    nodes = tl.arange(0, NODES)
    own = nodes < tl.load(size_B + tree)
    token_N = tl.load(token_X + first + nodes, mask=own, other=-1)
    parent_N = tl.load(parent_X + first + nodes, mask=own, other=-1)
    paths += first
    length = 0
    node = 0
    child = 1
    while child > 0:
        token = tl.load(sampled + first + node)
        fits = own & (parent_N == node) & (token_N == token)
        child = tl.max(tl.where(fits, nodes, 0), 0)
        if child > 0:
            tl.store(paths + length, child)
            length += 1
            node = child
    tl.store(lengths + tree, length)
    tl.store(ends + tree, first + node)


@triton.jit(do_not_specialize=["num_pages"])
def move_kernel(
    kv,
    lengths,
    paths,
    first_B,
    pages,
    table_B,
    committed_B,
    num_trees,
    num_pages,
    PAGE: tl.constexpr,
    SIDES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: trees, layers. A side: the keys or values of one head, which lie PAGE * SIZE apart."""
    tree, layer = tl.program_id(0), tl.program_id(1)
    if tree >= tl.load(num_trees):
        return
    root = tl.load(committed_B + tree)
    pages += tl.load(table_B + tree)
    paths += tl.load(first_B + tree)
    kv += layer.to(tl.int64) * num_pages * (SIDES * PAGE * SIZE)
    sides, i = tl.arange(0, BLOCK_SIDES), tl.arange(0, BLOCK_SIZE)
    real = (sides < SIDES)[:, None] & (i < SIZE)[None, :]
    places = sides[:, None] * (PAGE * SIZE) + i[None, :]
    for step in range(0, tl.load(lengths + tree)):
        node = tl.load(paths + step)
        if node != step + 1:
            source = _slot(kv, pages, root + node, PAGE, SIDES * PAGE * SIZE, SIZE)
            values = tl.load(source + places, mask=real)
            tl.debug_barrier()  # all is read before the next step writes over it
            target = _slot(kv, pages, root + step + 1, PAGE, SIDES * PAGE * SIZE, SIZE)
            tl.store(target + places, values, mask=real)


@triton.jit
def _slot(kv, pages, slot, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, SIZE: tl.constexpr):
    """Where a logical slot's first side lies. PAGE_SIZE: numbers of a page."""
    page = tl.load(pages + slot // PAGE).to(tl.int64)
    return kv + page * PAGE_SIZE + slot % PAGE * SIZE
