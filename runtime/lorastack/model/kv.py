"""The KV cache: pages of all layers. The engine knows which row owns which page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorastack.kernels.upload import upload
from lorastack.layout import ModelShapes


def page_nbytes(shapes: ModelShapes, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page, all layers together."""
    per_slot = 2 * shapes.num_kv_heads * shapes.head_dim * dtype.itemsize
    return shapes.num_layers * page_size * per_slot


class Move(NamedTuple):
    """Copies a row's logical slots `src` to its logical slots `dst`."""

    block_table: Sequence[int]
    src: Sequence[int]
    dst: Sequence[int]


class KVCache:
    """data: [num_layers, num_pages, 2, num_kv_heads, page_size, D], keys first.

    A head's keys of a page lie together, and so do its values: attention reads them in one piece.
    Memory is reserved, not touched: the system backs a page once something is written to it.
    """

    def __init__(
        self,
        shapes: ModelShapes,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.data = torch.empty(
            (shapes.num_layers, num_pages, 2, shapes.num_kv_heads, page_size, shapes.head_dim),
            dtype=dtype,
            device=device,
        )

    def write(self, layer: int, slots_T: Tensor, kv_TX: Tensor) -> None:
        """Store keys and values [T, 2 * num_kv_heads * D] at physical slots."""
        _, _, num_kv_heads, size, head_dim = self.data[layer].shape
        kv_T2KD = kv_TX.view(-1, 2, num_kv_heads, head_dim)
        self.data[layer, slots_T // size, :, :, slots_T % size] = kv_T2KD

    def clear(self, pages: Tensor) -> None:
        """Zero pages (int64 ids) that a new owner begins to fill.

        A mask hides finite values only: NaN that an earlier owner left would pass it.
        """
        if pages.numel():
            self.data.index_fill_(1, pages, 0)

    def move(self, moves: Sequence[Move]) -> None:
        """Copy slots of rows, keys and values of all layers.

        Everything is read before anything is written, so a row's slots may overlap.
        """
        places = [
            (*self._place(table, src), *self._place(table, dst))
            for table, sources, destinations in moves
            for src, dst in zip(sources, destinations, strict=True)
        ]
        if not places:
            return
        device = self.data.device
        src_pages, src_slots, pages, slots = upload(list(zip(*places, strict=True)), device)
        by_slot = self.data.movedim(4, 2)  # [num_layers, num_pages, page_size, 2, ...]
        by_slot[:, pages, slots] = by_slot[:, src_pages, src_slots]

    def _place(self, block_table: Sequence[int], slot: int) -> tuple[int, int]:
        """The page of a logical slot, and the slot's place within it."""
        return block_table[slot // self.page_size], slot % self.page_size
