"""Where adapters' LoRAs lie, and which tokens of a step use which: numbers that kernels read.

An adapter's table is made once, when its buffer has its place on the device. A step then names
tables by their addresses, so that a CUDA graph serves any adapters. Nothing is padded in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorastack.kernels.segmented_lora import GroupLora
from lorastack.kernels.triton.launch import float_bits
from lorastack.layout import GROUPS

TILE = 16  # tokens; a matrix instruction takes so many
RANKS = 16  # that one product takes
MAX_TARGETS = max(map(len, GROUPS))
TARGET_FIELDS = 4  # address of B, first row of A, rank, bits of the scale
SITE_FIELDS = 2 + MAX_TARGETS * TARGET_FIELDS  # address of A, its rows, and the targets
TILE_FIELDS = 4  # first token, tokens, first pair, pairs
PAIR_FIELDS = 6  # first token, tokens, table, bits of the scale, place in the workspace, width

Ints: TypeAlias = NDArray[np.int32]
Longs: TypeAlias = NDArray[np.int64]
Narrow = TypeVar("Narrow", Ints, Tensor)
Wide = TypeVar("Wide", Longs, Tensor)


def site_of(layer: int, group: int, num_layers: int) -> int:
    """A group's row of the tables; see `LoraWeights.groups` for the keys. lm_head follows the
    layers, and embed_tokens follows lm_head."""
    return num_layers * len(GROUPS) if layer < 0 else layer * len(GROUPS) + group


def embedding_site(num_layers: int) -> int:
    return num_layers * len(GROUPS) + 1


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """An adapter for the kernels. It holds addresses: whoever moves the buffer makes a new one.

    entries: [sites, SITE_FIELDS] int64 on the device; address: of them; width: rows of its largest
    joined A, rounded up to `RANKS`; what it adapts beside the layers.
    """

    entries: Tensor
    address: int
    width: int
    adapts_lm_head: bool
    adapts_embedding: bool

    @classmethod
    def of(
        cls,
        groups: Mapping[tuple[int, int], GroupLora],
        embedding: GroupLora | None,
        num_layers: int,
        device: torch.device,
    ) -> AdapterTable:
        """groups: by (layer, index into GROUPS), lm_head's layer is negative; embedding: its A is
        [rank, V]. Their tensors lie on the device, each run on a cache line."""
        entries = [[0] * SITE_FIELDS] * (embedding_site(num_layers) + 1)
        for key, group in groups.items():
            entries[site_of(*key, num_layers)] = _entry(group)
        if embedding is not None:
            entries[embedding_site(num_layers)] = _entry(embedding)
        joined = max((len(group.a_RI) for group in groups.values()), default=0)
        on_device = torch.tensor(entries, device=device)
        return cls(
            entries=on_device,
            address=on_device.data_ptr(),
            width=-(-joined // RANKS) * RANKS,
            adapts_lm_head=any(layer < 0 for layer, _ in groups),
            adapts_embedding=embedding is not None,
        )


class LoraUse(NamedTuple):
    """Tokens start..end use an adapter, scaled by the request's `scale`."""

    start: int
    end: int
    table: AdapterTable
    scale: float


@dataclass(frozen=True, slots=True)
class LoraArrays(Generic[Narrow, Wide]):
    """A step's numbers, on the host or on the device; nothing beyond the counts is read.

    counts [2] int32: tiles and pairs. adapted_T int32: 1 for tokens of a tile. tiles [tiles,
    TILE_FIELDS] int32: up to `TILE` tokens of one stack. pairs [pairs, PAIR_FIELDS] int64: a tile
    and an adapter of its stack, in the stack's order.
    """

    counts: Narrow
    adapted_T: Narrow
    tiles: Narrow
    pairs: Wide


def workspace_size(uses: Sequence[LoraUse]) -> int:
    """Floats that a chunk of these uses takes of the workspace, see `lora.shrink`."""
    return sum((use.end - use.start) * use.table.width for use in uses)


def plan_lora(uses: Sequence[LoraUse], num_tokens: int, into: LoraArrays[Ints, Longs]) -> None:
    """Fills `into` for a step of `num_tokens`.

    uses: those of a stack are neighbours, in the stack's order, over the same tokens; the tokens of
    two stacks do not overlap.
    """
    tiles: list[tuple[int, ...]] = []
    pairs: list[tuple[int, ...]] = []
    place = 0
    into.adapted_T[:num_tokens] = 0
    for (start, end), stack in groupby(uses, key=lambda use: use[:2]):
        members = [(use.table.address, use.table.width, float_bits(use.scale)) for use in stack]
        into.adapted_T[start:end] = 1
        for first in range(start, end, TILE):
            count = min(TILE, end - first)
            tiles.append((first, count, len(pairs), len(members)))
            for address, width, scale in members:
                pairs.append((first, count, address, scale, place, width))
                place += count * width
    into.counts[:] = len(tiles), len(pairs)
    if tiles:
        into.tiles[: len(tiles)] = tiles
        into.pairs[: len(pairs)] = pairs


def _entry(group: GroupLora) -> list[int]:
    row = [0] * SITE_FIELDS
    row[0], row[1] = group.a_RI.data_ptr(), len(group.a_RI)
    for target in group.targets:
        at = 2 + target.index * TARGET_FIELDS
        rank = target.rank.stop - target.rank.start
        row[at : at + TARGET_FIELDS] = (
            target.b_OR.data_ptr(), target.rank.start, rank, float_bits(target.scale)
        )  # fmt: skip
    return row
