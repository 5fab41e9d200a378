"""What a step's attention needs beside queries, keys and values: whole numbers, made on the host.

A query's tile holds up to `tokens_a_tile` neighbouring tokens of one row, with all query heads of
one key-value head. Its keys, by position, are cut into splits of fixed size, and an item of work is
one split of a tile, or several in turn. Which of the two changes no bit of the result (see
`attention`), so the longest tiles are spread while there is room for their parts.

Arrays have fixed places, so that a CUDA graph may read them, and nothing beyond the counts is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorastack.kernels.attention import RowSpan
from lorastack.kernels.triton.launch import power_of_two
from lorastack.layout import ModelShapes

MIN_TILE = 16  # rows that a matrix instruction takes
WIDE_KEY = 512  # bytes; of wider ones half as many are taken at once
# Of an item: its tile's first token, tokens and last position, its splits first..end, the place of
# its part (-1: none, the item has all splits), then the row's committed length, 1 for a chain, and
# where its pages begin in `lists`.
ITEM_FIELDS, ITEM_PAGES = 9, 8

Ints: TypeAlias = NDArray[np.int32]
Places: TypeAlias = NDArray[np.intp]
Array = TypeVar("Array", Ints, Tensor)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model and its cache fix. head_dim: even, up to 256; window: positions, None for all.

    block: keys that one product takes; split: positions of a split, a multiple of `block`. Both are
    part of the result's bits.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int | None
    block: int = 64
    split: int = 256

    @classmethod
    def of(
        cls, shapes: ModelShapes, page_size: int, window: int | None, dtype: torch.dtype
    ) -> AttentionShape:
        """With blocks of keys and values that any device has the shared memory for."""
        shape = cls(shapes.num_heads, shapes.num_kv_heads, shapes.head_dim, page_size, window)
        wide = shape.padded_dim * dtype.itemsize > WIDE_KEY
        return replace(shape, block=shape.block // 2) if wide else shape

    @property
    def share(self) -> int:
        """Query heads a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return max(MIN_TILE, power_of_two(self.share))

    @property
    def tokens_a_tile(self) -> int:
        return self.tile // self.share

    @property
    def padded_dim(self) -> int:
        return max(16, power_of_two(self.head_dim))


@dataclass(frozen=True, slots=True)
class AttentionArrays(Generic[Array]):
    """A step's numbers, int32, on the host or on the device.

    counts [2]: tokens and items; items [items, ITEM_FIELDS]; for each token its position, its
    physical slot (page * page size + place in the page), its tile's first item, and where its
    ancestors begin in `lists` (trees only: by depth, itself last, as places in the row); lists:
    pages of all rows and ancestors, of which a step fills only the beginning, so that they belong
    last in an upload.
    """

    counts: Array
    position_T: Array
    slot_T: Array
    item_T: Array
    line_T: Array
    items: Array
    lists: Array

    @staticmethod
    def lengths(max_tokens: int, max_parts: int, max_lists: int) -> dict[str, tuple[int, ...]]:
        """The shape of each array, by its name. max_parts: of `AttentionWorkspace`."""
        tokens = dict.fromkeys(("position_T", "slot_T", "item_T", "line_T"), (max_tokens,))
        items = (max_tokens + max_parts, ITEM_FIELDS)
        return {"counts": (2,), **tokens, "items": items, "lists": (max_lists,)}


def plan_attention(
    rows: Sequence[RowSpan], shape: AttentionShape, max_parts: int, into: AttentionArrays[Ints]
) -> int:
    """Fills `into` for a step and returns how long its `lists` are.

    rows: they cover the step's tokens in order, without gaps; max_parts: of `AttentionWorkspace`.
    """
    num_tokens = rows[-1].end
    lists, pages_B = _pages(rows, shape.page_size)
    start_B = np.array([row.start for row in rows], dtype=np.int32)
    count_B = np.array([row.num_tokens for row in rows], dtype=np.int32)
    committed_B = np.array([row.committed for row in rows], dtype=np.int32)
    row_T = np.arange(len(rows)).repeat(count_B)
    logical_T = (committed_B - start_B)[row_T] + np.arange(num_tokens, dtype=np.int32)
    position_T = into.position_T[:num_tokens]
    position_T[:] = logical_T
    if nodes := _add_ancestors(lists, rows):
        token_N, line_N, depth_N = np.array(nodes, dtype=np.int32).reshape(-1, 3).T
        into.line_T[token_N] = line_N
        position_T[token_N] = committed_B[row_T[token_N]] + depth_N
    pages = into.lists[: len(lists)]
    pages[:] = lists
    page_T, place_T = np.divmod(logical_T, shape.page_size)
    into.slot_T[:num_tokens] = pages[pages_B[row_T] + page_T] * shape.page_size + place_T

    start_G, row_G = _tiles(start_B, count_B, shape.tokens_a_tile)
    count_G = np.append(start_G[1:], num_tokens) - start_G
    last_G = np.maximum.reduceat(position_T, start_G)
    fields = np.zeros((len(start_G), ITEM_FIELDS), dtype=np.int32)
    fields[:, 0], fields[:, 1], fields[:, 2] = start_G, count_G, last_G
    if shape.window is not None:  # splits that no token of the tile sees change nothing
        lowest_G = np.minimum.reduceat(position_T, start_G) - shape.window + 1
        fields[:, 3] = np.maximum(lowest_G, 0) // shape.split
    fields[:, 4] = last_G // shape.split + 1
    fields[:, 6], fields[:, ITEM_PAGES] = committed_B[row_G], pages_B[row_G]
    fields[:, 7] = np.array([row.parents is None for row in rows])[row_G]
    items, item_G = _spread(fields, max_parts)
    into.counts[:] = num_tokens, len(items)
    into.items[: len(items)] = items
    into.item_T[:num_tokens] = item_G.repeat(count_G)
    return len(lists)


def _tiles(start_B: Ints, count_B: Ints, most: int) -> tuple[Ints, Places]:
    """First tokens and rows of the tiles, in the order of the tokens: rows in pieces of `most`."""
    tiles_B = -(-count_B // most)
    row_G = np.arange(len(start_B)).repeat(tiles_B)
    before_B = tiles_B.cumsum(dtype=np.int32) - tiles_B
    first_B = start_B - before_B * most
    return first_B[row_G] + np.arange(len(row_G), dtype=np.int32) * most, row_G


def _spread(fields: Ints, max_parts: int) -> tuple[Ints, Places]:
    """Items, and the first item of each tile.

    Tiles of several splits get an item a split, the longest of them while there is room for their
    parts; each of the others gets one item that takes its splits in turn.
    """
    num_G = fields[:, 4] - fields[:, 3]
    spread_G = num_G > 1
    if num_G.sum() > max_parts:
        order_G = (-num_G).argsort(kind="stable")
        spread_G[order_G[num_G[order_G].cumsum() > max_parts]] = False
    items_G = np.where(spread_G, num_G, 1)
    item_G = items_G.cumsum() - items_G
    tile_I = np.arange(len(fields)).repeat(items_G)
    items, spread_I = fields[tile_I], spread_G[tile_I]
    items[:, 3] += np.arange(len(items)) - item_G[tile_I]
    items[spread_I, 4] = items[spread_I, 3] + 1
    items[:, 5] = np.where(spread_I, spread_I.cumsum() - 1, -1)
    return items, item_G


def _pages(rows: Sequence[RowSpan], page_size: int) -> tuple[list[int], Ints]:
    """Pages of all rows, and where each row's begin."""
    lists: list[int] = []
    starts: list[int] = []
    for row in rows:
        starts.append(len(lists))
        lists += row.block_table[: -(-row.num_slots // page_size)]
    return lists, np.array(starts, dtype=np.int32)


def _add_ancestors(lists: list[int], rows: Sequence[RowSpan]) -> list[int]:
    """Appends the ancestors of every token of a tree; of each the token, where they begin, and its
    depth."""
    found: list[int] = []
    for row in rows:
        lines: list[list[int]] = []
        for node, parent in enumerate(row.parents or ()):
            found += (row.start + node, len(lists), 0 if parent < 0 else len(lines[parent]))
            lines.append([node] if parent < 0 else [*lines[parent], node])
            lists += lines[node]
    return found
