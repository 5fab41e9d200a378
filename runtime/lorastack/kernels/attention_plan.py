"""A step's plan for `kernels.attention.attend`: pure integers first, then tensors on the device.

`plan_attention` works on the host alone and gives lists of integers (`HostPlan.parts`). They go to
the device together with whatever else a step sends there, and `HostPlan.placed` makes the plan of
what has arrived. Masks are made there: their integers are far fewer than they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorastack.kernels.attention import AttentionGroup, AttentionPlan, RowSpan, depths

# Rows of a padded group are at least half as long as its longest, unless that is this short.
SHORT_ROW = 512  # slots


@dataclass(frozen=True, slots=True)
class _HostMask:
    """Which of L slots the N tokens of B rows see; token n of row b is at b * N + n.

    upto_BN: the last slot that it sees without exception. position_BN: its own, of which `window`
    counts back; [] without a window. seen: (token * L + slot) of what it sees beyond upto.
    """

    upto_BN: list[int]
    position_BN: list[int]
    seen: list[int]


@dataclass(frozen=True, slots=True)
class _HostGroup:
    """An `AttentionGroup` in integers. span: in place of tokens, where they are neighbours."""

    num_rows: int
    num_tokens: int
    num_slots: int
    pages: list[int]
    mask: _HostMask | None
    causal: bool
    folded: bool
    span: slice | None
    tokens: Sequence[int] = ()
    valid: Sequence[int] = ()
    outputs: Sequence[int] = ()

    @property
    def parts(self) -> list[Sequence[int]]:
        mask = self.mask or _HostMask([], [], [])
        shape = (self.pages, self.tokens, self.valid, self.outputs)
        return [*shape, mask.upto_BN, mask.position_BN, mask.seen]


@dataclass(frozen=True, slots=True)
class HostPlan:
    """A step's plan in integers. See `AttentionPlan`; share, window: see `plan_attention`."""

    positions: list[int]
    slots: list[int]
    fresh_pages: list[int]
    groups: list[_HostGroup]
    share: int
    window: int | None

    @property
    def parts(self) -> list[Sequence[int]]:
        """What the device needs of it."""
        groups = [part for group in self.groups for part in group.parts]
        return [self.positions, self.slots, self.fresh_pages, *groups]

    def placed(self, parts: Iterator[Tensor], dtype: torch.dtype) -> AttentionPlan:
        """The plan of `parts`, int64 on the device. dtype: of the queries."""
        positions_T, slots_T, fresh_pages = (next(parts) for _ in range(3))
        groups = tuple(self._group(group, parts, dtype) for group in self.groups)
        return AttentionPlan(positions_T, slots_T, fresh_pages, groups)

    def _group(
        self, group: _HostGroup, parts: Iterator[Tensor], dtype: torch.dtype
    ) -> AttentionGroup:
        pages, tokens, valid, outputs, *mask = (next(parts) for _ in group.parts)
        span = group.span
        return AttentionGroup(
            num_rows=group.num_rows,
            num_tokens=group.num_tokens,
            num_slots=group.num_slots,
            tokens=tokens if span is None else span,
            valid=valid if span is None else None,
            outputs=outputs if span is None else span,
            pages=pages,
            mask=None if group.mask is None else self._mask(group, dtype, *mask),
            causal=group.causal,
            folded=group.folded,
        )

    def _mask(
        self,
        group: _HostGroup,
        dtype: torch.dtype,
        upto_X: Tensor,
        position_X: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """[B, 1, N, L]; [B, 1, N * share, L] where several tokens are folded. X: B * N."""
        slot_L = torch.arange(group.num_slots, device=upto_X.device)
        allowed_XL = slot_L <= upto_X[:, None]
        if self.window is not None:
            allowed_XL &= slot_L > position_X[:, None] - self.window
        allowed_XL.view(-1).index_fill_(0, seen, True)
        if group.folded and group.num_tokens > 1:
            allowed_XL = allowed_XL[:, None].expand(-1, self.share, -1)
        mask = torch.zeros(allowed_XL.shape, dtype=dtype, device=upto_X.device)
        mask.masked_fill_(~allowed_XL, -torch.inf)
        return mask.view(group.num_rows, 1, -1, group.num_slots)


def plan_attention(
    rows: Sequence[RowSpan], *, page_size: int, share: int, window: int | None
) -> HostPlan:
    """Rows cover the step's tokens in order, without gaps.

    share: query heads a key-value head; window: positions, None for all.
    """
    positions: list[int] = []
    slots: list[int] = []
    fresh: list[int] = []
    for row in rows:
        assert row.start == len(positions) and row.num_tokens > 0, (
            "rows must cover the step in order"
        )
        positions += [row.committed + depth for depth in depths(row)]
        for slot in range(row.committed, row.num_slots):
            page, offset = row.block_table[slot // page_size], slot % page_size
            slots.append(page * page_size + offset)
            if offset == 0:
                fresh.append(page)

    single = [row for row in rows if row.num_tokens == 1]
    trees = [row for row in rows if row.num_tokens > 1 and row.parents is not None]
    chunks = [row for row in rows if row.num_tokens > 1 and row.parents is None]
    make = _GroupMaker(page_size, window)
    groups = [make.padded(group) for kind in (single, trees) for group in _by_length(kind)]
    groups += [make.chunk(row) for row in chunks]
    return HostPlan(positions, slots, fresh, groups, share, window)


def _by_length(rows: Sequence[RowSpan]) -> list[list[RowSpan]]:
    """Rows to pad together: the longest row of a group is short or at most twice any other."""
    if not rows or max(row.num_slots for row in rows) <= SHORT_ROW:
        return [list(rows)] if rows else []
    groups: list[list[RowSpan]] = []
    for row in sorted(rows, key=lambda row: row.num_slots, reverse=True):
        longest = groups[-1][0].num_slots if groups else 0
        if groups and (longest <= SHORT_ROW or longest <= 2 * row.num_slots):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@dataclass(frozen=True, slots=True)
class _GroupMaker:
    """Builds the groups of a step."""

    page_size: int
    window: int | None

    def chunk(self, row: RowSpan) -> _HostGroup:
        """A prompt chunk: every token sees what lies before it, and nothing is padded."""
        causal = row.committed == 0 and (self.window is None or row.num_slots <= self.window)
        own = list(range(row.committed, row.num_slots))
        return _HostGroup(
            num_rows=1,
            num_tokens=row.num_tokens,
            num_slots=row.num_slots,
            pages=self._pages([row], row.num_slots),
            mask=None if causal else _HostMask(own, own if self.window is not None else [], []),
            causal=causal,
            folded=False,
            span=slice(row.start, row.end),
        )

    def padded(self, rows: Sequence[RowSpan]) -> _HostGroup:
        """Single tokens or trees of several rows. Padding tokens repeat the row's first one."""
        num_tokens = max(row.num_tokens for row in rows)
        num_slots = max(row.num_slots for row in rows)
        span: slice | None = slice(rows[0].start, rows[-1].end)
        tokens: list[int] = []
        valid: list[int] = []
        even = all(row.num_tokens == num_tokens for row in rows)
        if not even or any(a.end != b.start for a, b in pairwise(rows)):
            span = None
            tokens = [
                row.start + (j if j < row.num_tokens else 0)
                for row in rows
                for j in range(num_tokens)
            ]
            valid = [
                i * num_tokens + j for i, row in enumerate(rows) for j in range(row.num_tokens)
            ]
        return _HostGroup(
            num_rows=len(rows),
            num_tokens=num_tokens,
            num_slots=num_slots,
            pages=self._pages(rows, num_slots),
            mask=self._padded_mask(rows, num_tokens, num_slots),
            causal=False,
            folded=True,
            span=span,
            tokens=tokens,
            valid=valid,
            outputs=[tokens[place] for place in valid],
        )

    def _padded_mask(
        self, rows: Sequence[RowSpan], num_tokens: int, num_slots: int
    ) -> _HostMask | None:
        """None when nothing is masked."""
        if (
            num_tokens == 1
            and all(row.num_slots == num_slots for row in rows)
            and (self.window is None or num_slots <= self.window)
        ):
            return None
        # The first token's slot is its position, so all see up to it as far as the window reaches.
        upto_BN = [row.committed for row in rows for _ in range(num_tokens)]
        position_BN: list[int] = []
        if self.window is not None:
            # Padding tokens take the row's first position: nothing reads their output.
            for row in rows:
                padding = [0] * (num_tokens - row.num_tokens)
                position_BN += [row.committed + depth for depth in depths(row) + padding]
        seen = [
            (i * num_tokens + j) * num_slots + row.committed + ancestor
            for i, row in enumerate(rows)
            for j, ancestor in _lineage(row, self.window)
        ]
        return _HostMask(upto_BN, position_BN, seen)

    def _pages(self, rows: Sequence[RowSpan], num_slots: int) -> list[int]:
        num_pages = -(-num_slots // self.page_size)
        pages: list[int] = []
        for row in rows:
            own = list(row.block_table[: -(-row.num_slots // self.page_size)])
            # A row's own last page pads it: a foreign page might hold NaN, which no mask removes.
            pages += own + own[-1:] * (num_pages - len(own))
        return pages


def _lineage(row: RowSpan, window: int | None) -> list[tuple[int, int]]:
    """(token, ancestor or itself) pairs within the window, but for the row's first token."""
    pairs: list[tuple[int, int]] = []
    parents = row.parents if row.parents is not None else range(-1, row.num_tokens - 1)
    for token in range(row.num_tokens):
        ancestor, distance = token, 0
        while ancestor > 0 and (window is None or distance < window):
            pairs.append((token, ancestor))
            ancestor, distance = parents[ancestor], distance + 1
    return pairs
