"""Attention of a step's tokens over paged KV: chains, trees and prompt chunks in one batch.

Contract. A step's tokens belong to rows; row r owns tokens start..end of the step and reads its
KV through a block table: logical slot s lies at physical slot block_table[s // P] * P + s % P,
where P is the page size. Slots [0, committed) hold accepted tokens, slot s the token of position s.
The j-th token of a row is written at slot committed + j. Its parent is an earlier token of the row
(or none, -1, for the first); its depth is the number of its ancestors, its position is committed +
depth. It attends to the committed slots, its ancestors' and its own, as far as they are less than
`window` positions back. The output is softmax(q k / sqrt(D)) v over those, heads grouped for GQA,
with the softmax in float32.

KV of one layer is [num_pages, 2, num_kv_heads, P, D], keys first.

The fast path plans once a step (`plan_attention`, index tensors and masks) and then needs few calls
a layer: single tokens of all rows are one padded SDPA call, trees another, each chunk has its own.
A padded group whose rows differ much in length is split, so that a long row does not make its
neighbours pay. A group's padding reads the row's own pages: what lies in others' never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Rows of a padded group are at least half as long as its longest, unless that is this short.
SHORT_ROW = 512  # slots


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One row of a step, filled by the runner.

    start, end: its tokens in the step; block_table: page ids, enough for committed + (end - start)
    slots; committed: slots already filled; parents: per token the index of its parent within the
    row, -1 for the first; None for a chain. prompt: tokens of its prompt, for dynamic RoPE alone.
    """

    start: int
    end: int
    block_table: Sequence[int]
    committed: int
    parents: tuple[int, ...] | None = None
    prompt: int = 0

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_slots(self) -> int:
        """Slots in use once this step's tokens are written."""
        return self.committed + self.end - self.start


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of one SDPA call, padded to N tokens and L slots.

    tokens: places of their tokens in the step, a slice where they are neighbours and nothing is
    padded, else indices [B * N]. valid: those of the B * N that are real, None: all. outputs:
    places of the real ones in the step. pages: physical page ids [B * pages a row]. mask: added to
    the scores, [B, 1, queries or 1, L], None where all see everything. causal: the one row starts
    at slot 0 and sees itself only. folded: query heads that share keys are further queries of one
    head, token by token, so that few tokens read K and V once.
    """

    num_rows: int
    num_tokens: int
    num_slots: int
    tokens: slice | Tensor
    valid: Tensor | None
    outputs: slice | Tensor
    pages: Tensor
    mask: Tensor | None
    causal: bool
    folded: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step needs in every layer. positions_T: for RoPE. slots_T: physical, for writing KV.
    fresh_pages: pages whose first slot is written now; nothing older in them may be read."""

    positions_T: Tensor
    slots_T: Tensor
    fresh_pages: Tensor
    groups: tuple[_Group, ...]


def depths(row: RowSpan) -> list[int]:
    """Depth of every token of the row."""
    if row.parents is None:
        return list(range(row.num_tokens))
    depth: list[int] = []
    for parent in row.parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return depth


def plan_attention(
    rows: Sequence[RowSpan],
    *,
    page_size: int,
    share: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Index tensors and masks of a step. Rows cover its tokens in order, without gaps.

    share: query heads a key-value head; window: positions, None for all; dtype: of the queries.
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
    make = _GroupMaker(page_size, share, window, dtype, device)
    groups = [make.padded(group) for kind in (single, trees) for group in _by_length(kind)]
    groups += [make.chunk(row) for row in chunks]
    return AttentionPlan(
        positions_T=torch.tensor(positions, device=device),
        slots_T=torch.tensor(slots, device=device),
        fresh_pages=torch.tensor(fresh, dtype=torch.int64, device=device),
        groups=tuple(groups),
    )


def attend(q_THD: Tensor, kv: Tensor, plan: AttentionPlan) -> Tensor:
    """[T, heads * D]. q_THD: queries after RoPE; kv: one layer's, this step's tokens written."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = kv.shape[2]
    share = num_heads // num_kv_heads
    out_THD = q_THD.new_empty(num_tokens, num_heads, head_dim)
    for group in plan.groups:
        rows, tokens = group.num_rows, group.num_tokens
        row_kv = kv.index_select(0, group.pages).view(rows, -1, *kv.shape[1:])
        # [2, B, kv heads, pages of a row, P, D], then slots of all pages in a row
        by_head = row_kv.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        k_BHLD, v_BHLD = by_head[..., : group.num_slots, :].unbind(0)
        q = q_THD[group.tokens].view(rows, tokens, num_kv_heads, share, head_dim)
        if group.folded:
            by_key = q.transpose(1, 2)  # [B, kv heads, N, share, D]
            queries = by_key.reshape(rows, num_kv_heads, tokens * share, head_dim)
            result = sdpa(queries, k_BHLD, v_BHLD, group.mask).reshape(by_key.shape)
        else:
            queries = q.flatten(2, 3).transpose(1, 2)  # [B, heads, N, D]
            result = sdpa(
                queries, k_BHLD, v_BHLD, group.mask, is_causal=group.causal, enable_gqa=True
            )
        result = result.transpose(1, 2).reshape(-1, num_heads, head_dim)
        out_THD[group.outputs] = result if group.valid is None else result[group.valid]
    return out_THD.view(num_tokens, -1)


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
    share: int
    window: int | None
    dtype: torch.dtype
    device: torch.device

    def chunk(self, row: RowSpan) -> _Group:
        """A prompt chunk: every token sees what lies before it, and nothing is padded."""
        num_tokens, num_slots = row.num_tokens, row.num_slots
        causal = row.committed == 0 and (self.window is None or num_slots <= self.window)
        mask = None
        if not causal:
            query = torch.arange(row.committed, num_slots)[:, None]
            slot = torch.arange(num_slots)[None]
            allowed = slot <= query
            if self.window is not None:
                allowed &= slot > query - self.window
            mask = self._additive(allowed[None, None])
        return _Group(
            num_rows=1,
            num_tokens=num_tokens,
            num_slots=num_slots,
            tokens=slice(row.start, row.end),
            valid=None,
            outputs=slice(row.start, row.end),
            pages=self._pages([row], num_slots),
            mask=mask,
            causal=causal,
            folded=False,
        )

    def padded(self, rows: Sequence[RowSpan]) -> _Group:
        """Single tokens or trees of several rows. Padding tokens repeat the row's first one."""
        num_tokens = max(row.num_tokens for row in rows)
        num_slots = max(row.num_slots for row in rows)
        tokens: slice | Tensor = slice(rows[0].start, rows[-1].end)
        outputs, valid = tokens, None
        even = all(row.num_tokens == num_tokens for row in rows)
        if not even or any(a.end != b.start for a, b in pairwise(rows)):
            index = [
                row.start + (j if j < row.num_tokens else 0)
                for row in rows
                for j in range(num_tokens)
            ]
            real = [i * num_tokens + j for i, row in enumerate(rows) for j in range(row.num_tokens)]
            tokens = torch.tensor(index, device=self.device)
            valid = torch.tensor(real, device=self.device)
            outputs = tokens[valid]
        return _Group(
            num_rows=len(rows),
            num_tokens=num_tokens,
            num_slots=num_slots,
            tokens=tokens,
            valid=valid,
            outputs=outputs,
            pages=self._pages(rows, num_slots),
            mask=self._padded_mask(rows, num_tokens, num_slots),
            causal=False,
            folded=True,
        )

    def _padded_mask(
        self, rows: Sequence[RowSpan], num_tokens: int, num_slots: int
    ) -> Tensor | None:
        """[B, 1, N * share, L], for single tokens [B, 1, 1, L]; None when nothing is masked."""
        if (
            num_tokens == 1
            and all(row.num_slots == num_slots for row in rows)
            and (self.window is None or num_slots <= self.window)
        ):
            return None
        slot = torch.arange(num_slots)
        committed_B = torch.tensor([row.committed for row in rows])
        allowed_BNL = (slot < committed_B[:, None])[:, None].repeat(1, num_tokens, 1)
        if self.window is not None:
            # Padding tokens take the row's first position: nothing reads their output.
            depth = [depths(row) + [0] * (num_tokens - row.num_tokens) for row in rows]
            position_BN = committed_B[:, None] + torch.tensor(depth)
            allowed_BNL &= slot > position_BN[..., None] - self.window
        seen = [
            (i, j, row.committed + ancestor)
            for i, row in enumerate(rows)
            for j, ancestor in _lineage(row, num_tokens, self.window)
        ]
        row_index, token_index, slot_index = torch.tensor(seen).unbind(1)
        allowed_BNL[row_index, token_index, slot_index] = True
        if num_tokens > 1:
            allowed_BNL = allowed_BNL.repeat_interleave(self.share, dim=1)
        return self._additive(allowed_BNL[:, None])

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype)
        return mask.masked_fill_(~allowed, -torch.inf).to(self.device)

    def _pages(self, rows: Sequence[RowSpan], num_slots: int) -> Tensor:
        num_pages = -(-num_slots // self.page_size)
        pages: list[int] = []
        for row in rows:
            own = list(row.block_table[: -(-row.num_slots // self.page_size)])
            # A row's own last page pads it: a foreign page might hold NaN, which no mask removes.
            pages += own + own[-1:] * (num_pages - len(own))
        return torch.tensor(pages, device=self.device)


def _lineage(row: RowSpan, num_tokens: int, window: int | None) -> list[tuple[int, int]]:
    """(token, ancestor or itself) pairs within the window; padding tokens see the first token."""
    pairs: list[tuple[int, int]] = [(j, 0) for j in range(row.num_tokens, num_tokens)]
    parents = row.parents if row.parents is not None else range(-1, row.num_tokens - 1)
    for token in range(row.num_tokens):
        ancestor, distance = token, 0
        while ancestor >= 0 and (window is None or distance < window):
            pairs.append((token, ancestor))
            ancestor, distance = parents[ancestor], distance + 1
    return pairs


def attend_reference(
    q_THD: Tensor, kv: Tensor, rows: Sequence[RowSpan], window: int | None
) -> Tensor:
    """The contract token by token and head by head, in float64."""
    num_tokens, num_heads, head_dim = q_THD.shape
    _, num_kv_heads, page_size, _ = kv.shape[1:]
    out_THD = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float64)
    for row in rows:
        parents = row.parents if row.parents is not None else range(-1, row.num_tokens - 1)
        depth = depths(row)
        for j in range(row.num_tokens):
            position = row.committed + depth[j]
            seen = {slot: slot for slot in range(row.committed)}  # slot -> position
            ancestor = j
            while ancestor >= 0:
                seen[row.committed + ancestor] = row.committed + depth[ancestor]
                ancestor = parents[ancestor]
            slots = [s for s, p in seen.items() if window is None or p > position - window]
            pages = [row.block_table[slot // page_size] for slot in slots]
            kv_S = kv.movedim(3, 1)[pages, [slot % page_size for slot in slots]].double()
            for head in range(num_heads):
                k_SD, v_SD = kv_S[:, :, head * num_kv_heads // num_heads].unbind(1)
                scores_S = k_SD @ q_THD[row.start + j, head].double() / head_dim**0.5
                out_THD[row.start + j, head] = scores_S.softmax(0) @ v_SD
    return out_THD.view(num_tokens, -1)
