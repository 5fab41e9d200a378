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

The fast path plans once a step (`kernels.attention_plan`) and then needs few calls a layer: single
tokens of all rows are one padded SDPA call, trees another, each chunk has its own. A padded group
whose rows differ much in length is split, so that a long row does not make its neighbours pay. A
group's padding reads the row's own pages: what lies in others' never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa


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
class AttentionGroup:
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
    groups: tuple[AttentionGroup, ...]


def depths(row: RowSpan) -> list[int]:
    """Depth of every token of the row."""
    if row.parents is None:
        return list(range(row.num_tokens))
    depth: list[int] = []
    for parent in row.parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return depth


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
