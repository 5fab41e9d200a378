"""What a step's attention needs beside queries, keys and values: whole numbers, made on the host.

A query's tile holds up to `tokens_a_tile` neighbouring tokens of one row, with all query heads of
one key-value head. Its keys, by position, are cut into splits of fixed size, and an item of work is
one split of a tile, or several in turn. Which of the two changes no bit of the result (see
`attention`), so the longest tiles are spread while there is room for their parts.

Arrays have fixed places, so that a CUDA graph may read them, and nothing beyond the counts is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorastack.kernels.attention import RowSpan, depths

MIN_TILE = 16  # rows that a matrix instruction takes
# Of an item: its tile's first token, tokens and last position, its splits first..end, the place of
# its part (-1: none, the item has all splits), then the row's committed length, 1 for a chain, and
# where its pages begin in `lists`.
ITEM_FIELDS = 9

Ints: TypeAlias = NDArray[np.int32]
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

    @property
    def share(self) -> int:
        """Query heads a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return max(MIN_TILE, _power_of_2(self.share))

    @property
    def tokens_a_tile(self) -> int:
        return self.tile // self.share

    @property
    def padded_dim(self) -> int:
        return max(16, _power_of_2(self.head_dim))


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
        """The shape of each array, by its name. max_parts: of `Workspace`."""
        tokens = dict.fromkeys(("position_T", "slot_T", "item_T", "line_T"), (max_tokens,))
        items = (max_tokens + max_parts, ITEM_FIELDS)
        return {"counts": (2,), **tokens, "items": items, "lists": (max_lists,)}


def plan_attention(
    rows: Sequence[RowSpan], shape: AttentionShape, max_parts: int, into: AttentionArrays[Ints]
) -> int:
    """Fills `into` for a step and returns how long its `lists` are.

    rows: they cover the step's tokens in order, without gaps; max_parts: see `Workspace`.
    """
    tokens = rows[-1].end
    lists, pages_B = _pages(rows, shape.page_size)
    start_B, end_B, committed_B, chain_B = np.array(
        [(row.start, row.end, row.committed, row.parents is None) for row in rows], dtype=np.int32
    ).T
    row_T = np.repeat(np.arange(len(rows)), end_B - start_B)
    place_T = np.arange(tokens, dtype=np.int32) - start_B[row_T]
    logical_T = committed_B[row_T] + place_T
    into.position_T[:tokens] = logical_T
    for row in rows:
        if row.parents is not None:
            into.position_T[row.start : row.end] = row.committed + np.array(depths(row))
            into.line_T[row.start : row.end] = _add_ancestors(lists, row.parents)
    lists_L = np.array(lists, dtype=np.int32)
    pages_T = lists_L[pages_B[row_T] + logical_T // shape.page_size]
    into.slot_T[:tokens] = pages_T * shape.page_size + logical_T % shape.page_size
    into.lists[: len(lists)] = lists_L

    tiles = _tiles(start_B, end_B, shape.tokens_a_tile)
    row_G = row_T[tiles.start_G]
    position_T = into.position_T[:tokens]
    last_G = np.maximum.reduceat(position_T, tiles.start_G)
    first_G = np.zeros_like(last_G)
    if shape.window is not None:  # splits that no token of the tile sees change nothing
        lowest_G = np.minimum.reduceat(position_T, tiles.start_G)
        first_G = np.maximum(lowest_G - shape.window + 1, 0) // shape.split
    fields = np.stack(
        (tiles.start_G, tiles.count_G, last_G, first_G, last_G // shape.split + 1, first_G,
         committed_B[row_G], chain_B[row_G], pages_B[row_G])
    ).T  # fmt: skip
    items, item_G = _spread(fields, max_parts)
    into.counts[:] = tokens, len(items)
    into.items[: len(items)] = items
    into.item_T[:tokens] = np.repeat(item_G, tiles.count_G)
    return len(lists)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """First tokens and numbers of tokens, in the order of the tokens."""

    start_G: Ints
    count_G: Ints


def _tiles(start_B: Ints, end_B: Ints, most: int) -> _Tiles:
    """Cuts every row into tiles of up to `most` tokens."""
    num_B = -(-(end_B - start_B) // most)
    before_B = np.cumsum(num_B) - num_B
    start_G = np.repeat(start_B, num_B)
    start_G += (np.arange(len(start_G)) - np.repeat(before_B, num_B)).astype(np.int32) * most
    return _Tiles(start_G, np.minimum(np.repeat(end_B, num_B) - start_G, most))


def _spread(fields: Ints, max_parts: int) -> tuple[Ints, NDArray[np.intp]]:
    """Items, and the first item of each tile.

    The longest tiles get an item a split while there is room for their parts, and an item's place
    is its part's; each of the others gets one item that takes its splits in turn.
    """
    num_G = fields[:, 4] - fields[:, 3]
    order_G = np.argsort(-num_G, kind="stable")
    num_G, fields = num_G[order_G], fields[order_G]
    spread = int(np.count_nonzero((num_G > 1) & (np.cumsum(num_G) <= max_parts)))
    items_G = num_G.copy()
    items_G[spread:] = 1
    first_G = np.cumsum(items_G) - items_G
    items = np.repeat(fields, items_G, axis=0)
    parts = int(num_G[:spread].sum())
    place = np.arange(parts)
    items[:parts, 3] += place - np.repeat(first_G[:spread], num_G[:spread])
    items[:parts, 4] = items[:parts, 3] + 1
    items[:parts, 5] = place
    items[parts:, 5] = -1
    item_G = np.empty_like(first_G)
    item_G[order_G] = first_G
    return items, item_G


def _pages(rows: Sequence[RowSpan], page_size: int) -> tuple[list[int], Ints]:
    """Pages of all rows, and where each row's begin."""
    lists: list[int] = []
    starts: list[int] = []
    for row in rows:
        starts.append(len(lists))
        lists += row.block_table[: -(-row.num_slots // page_size)]
    return lists, np.array(starts, dtype=np.int32)


def _add_ancestors(lists: list[int], parents: Sequence[int]) -> list[int]:
    """Appends every token's ancestors, and returns where they begin."""
    lines: list[list[int]] = []
    starts: list[int] = []
    for token, parent in enumerate(parents):
        line = [token] if parent < 0 else [*lines[parent], token]
        lines.append(line)
        starts.append(len(lists))
        lists += line
    return starts


def _power_of_2(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()
