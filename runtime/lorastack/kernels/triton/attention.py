"""Attention of chains, trees and prompt chunks over paged KV; contract: `kernels.attention`.

A token's bits depend on its own past alone:

- Keys are taken by position, not by slot. Below a row's committed length, and in all of a chain, a
  position's slot is the position; a tree's token finds its ancestors by depth. So a drafted token
  meets the same keys at the same places as the token decoded alone.
- Positions are cut into blocks of fixed size, those into splits of fixed size from position 0. A
  split is one running softmax over its blocks, and splits are added in their order, by the same
  sums whether one program takes all of them or each has its own.
- What a token does not see weighs exactly 0 and changes no bit. Nothing that is not the row's own
  is read, so that pages need no clearing, and what of the row's own a token does not see may be
  NaN: it stays out of its sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.attention_plan import ITEM_FIELDS, AttentionArrays, AttentionShape
from lorastack.kernels.triton.launch import launch, power_of_two

ALL = 1 << 30  # a window that nothing lies outside of
STAGED_BYTES = 72 << 10  # of keys and values that may be in flight beside the rest of a program


@dataclass(frozen=True, slots=True)
class AttentionWorkspace:
    """Parts of tiles whose splits are spread over programs, and how many programs there are.

    sums [parts, kv heads, tile, D] and softmax [parts, kv heads, tile, 2] (largest score, sum),
    float32. max_parts: at least the splits of the longest row. programs: about three for each
    multiprocessor, which hold that many at once; no bit depends on it.
    """

    sums: Tensor
    softmax: Tensor
    programs: int

    @classmethod
    def of(
        cls, shape: AttentionShape, max_parts: int, programs: int, device: torch.device
    ) -> AttentionWorkspace:
        lines = (max_parts, shape.num_kv_heads, shape.tile)
        sums = torch.empty(*lines, shape.padded_dim, device=device)
        return cls(sums, torch.empty(*lines, 2, device=device), programs)


def attend(
    q_TX: Tensor,
    kv: Tensor,
    step: AttentionArrays[Tensor],
    workspace: AttentionWorkspace,
    out_TX: Tensor,
    shape: AttentionShape,
    bucket: int,
) -> None:
    """Writes out_TX, [tokens, heads * D], of the step's tokens.

    q_TX: [tokens, heads * D], after RoPE; kv: one layer's, [pages, 2, kv heads, P, D], this step's
    tokens written; all of one dtype and contiguous. bucket: at least the step's tokens; what it
    has beyond them is neither read nor written.
    """
    assert shape.split % shape.block == 0, "a block must not reach into the next split"
    itemsize = kv.element_size()
    few = shape.tile * shape.padded_dim * itemsize <= 4096  # bytes of queries that 4 warps hold
    staged = 4 * shape.block * shape.padded_dim * itemsize
    common = {
        "SHARE": shape.share,
        "KV_HEADS": shape.num_kv_heads,
        "D": shape.head_dim,
        "DP": shape.padded_dim,
        "TILE": shape.tile,
        "SPLIT": shape.split,
        "FIELDS": ITEM_FIELDS,
    }
    launch(
        attention_kernel,
        (workspace.programs,),
        *(q_TX, kv, out_TX, step.counts, step.items, step.position_T, step.line_T, step.lists),
        *(workspace.sums, workspace.softmax),
        *(shape.head_dim**-0.5 / math.log(2), shape.window or ALL),
        PAGE=shape.page_size,
        BLOCK=shape.block,
        **common,
        num_warps=4 if few else 8,
        num_stages=2 if staged <= STAGED_BYTES else 1,
        maxnreg=168 if few else 232,  # three programs of 4 warps a multiprocessor, else one of 8
    )
    launch(
        combine_kernel,
        (bucket, shape.num_kv_heads),
        *(out_TX, step.counts, step.items, step.position_T, step.item_T),
        *(workspace.sums, workspace.softmax),
        HEADS=power_of_two(shape.share),
        AT_ONCE=4,
        **common,
        num_warps=2,
    )


@triton.jit
def _take_block(q_MD, k_ND, v_ND, see_MN, scale, peak_M, total_M, sum_MD):
    """One block of keys into a running softmax, in base 2."""
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
    score_MN = tl.where(see_MN, score_MN, float("-inf"))
    new_M = tl.maximum(peak_M, tl.max(score_MN, 1))
    safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # nothing seen so far
    keep_M = tl.exp2(peak_M - safe_M)
    weight_MN = tl.exp2(score_MN - safe_M[:, None])
    total_M = total_M * keep_M + tl.sum(weight_MN, 1)
    before_MD = sum_MD * keep_M[:, None]
    sum_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, before_MD, input_precision="ieee")
    return new_M, total_M, sum_MD


@triton.jit
def _add_split(peak, total, sum_D, split_peak, split_total, split_sum_D):
    """A split's result into that of the splits before it. One query or several, sums [..., D]."""
    new = tl.maximum(peak, split_peak)
    safe = tl.where(new == float("-inf"), 0.0, new)
    keep, weight = tl.exp2(peak - safe), tl.exp2(split_peak - safe)
    total = total * keep + split_total * weight
    sum_D = sum_D * keep[:, None] + split_sum_D * weight[:, None]
    return new, total, sum_D


@triton.jit
def _result(total_M, sum_MD):
    """Of all splits. Adding 0 makes one zero of two, as blocks that a token does not see do."""
    return sum_MD / total_M[:, None] + 0.0


@triton.jit
def _load_block(
    keys, values, pages, slot_N, there_N, d_D,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head's keys and values of a row's slots, 0 where there are none."""
    page_N = tl.load(pages + slot_N // PAGE, mask=there_N, other=0).to(tl.int64)
    at_N = page_N * (2 * KV_HEADS * PAGE * D) + slot_N % PAGE * D
    at_ND, mask_ND = at_N[:, None] + d_D[None, :], there_N[:, None] & (d_D < D)[None, :]
    k_ND = tl.load(keys + at_ND, mask=mask_ND, other=0.0)
    v_ND = tl.load(values + at_ND, mask=mask_ND, other=0.0)
    return k_ND, v_ND


@triton.jit
def _attend_split(
    q_MD, keys, values, pages, lists, lines, positions, place_M, position_M, first, end, shared,
    count, last, lowest, committed, chain, scale, window,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The running softmax of positions first..end.

    The first `shared` blocks are one product for all tokens of the tile, the others one for each.
    lines, positions: of the tile's tokens; lowest: position that one of them sees.
    """
    d_D, n_N = tl.arange(0, q_MD.shape[1]), tl.arange(0, BLOCK)
    blocks = tl.cdiv(end - first, BLOCK)
    peak_M = tl.full((q_MD.shape[0],), float("-inf"), tl.float32)
    total_M = tl.zeros((q_MD.shape[0],), tl.float32)
    sum_MD = tl.zeros(q_MD.shape, tl.float32)
    again = 1
    while again > 0:
        peak_M = tl.full((q_MD.shape[0],), float("-inf"), tl.float32)
        total_M = tl.zeros((q_MD.shape[0],), tl.float32)
        sum_MD = tl.zeros(q_MD.shape, tl.float32)
        for product in range(0, shared + (blocks - shared) * count):
            alone = product >= shared
            behind = tl.maximum(product - shared, 0)
            j = behind % count
            p_N = first + tl.where(alone, shared + behind // count, product) * BLOCK + n_N
            own = tl.where(alone, tl.load(positions + j), last)
            there_N = (p_N <= own) & (p_N >= tl.where(alone, own - window + 1, lowest))
            drafted_N = (p_N >= committed) & alone & (chain == 0)
            ancestors = lists + tl.load(lines + j, mask=alone & (chain == 0), other=0)
            ancestor_N = tl.load(ancestors + (p_N - committed), mask=there_N & drafted_N, other=0)
            slot_N = tl.where(drafted_N, committed + ancestor_N, p_N)
            k_ND, v_ND = _load_block(keys, values, pages, slot_N, there_N, d_D, KV_HEADS, D, PAGE)
            mine_M = (place_M == j) | (alone == 0)
            see_MN = (p_N[None, :] <= position_M[:, None]) & mine_M[:, None]
            see_MN &= p_N[None, :] > position_M[:, None] - window
            new_peak_M, new_total_M, new_sum_MD = _take_block(
                q_MD, k_ND, v_ND, see_MN, scale, peak_M, total_M, sum_MD
            )
            peak_M = tl.where(mine_M, new_peak_M, peak_M)
            total_M = tl.where(mine_M, new_total_M, total_M)
            sum_MD = tl.where(mine_M[:, None], new_sum_MD, sum_MD)
        # 0 times NaN is NaN: if there is any, it may be of a key that not all tokens see.
        odd = tl.max(tl.max(tl.where(sum_MD == sum_MD, 0, 1), 1), 0)
        again = tl.where((count > 1) & (shared > 0), odd, 0)
        shared = 0
    return peak_M, total_M, sum_MD


# A step's arrays begin where their bucket's upload has them: one kernel serves all places.
@triton.jit(do_not_specialize_on_alignment=["counts", "items", "position", "line", "lists"])
def attention_kernel(
    q, kv, out, counts, items, position, line, lists, sums, softmax, scale, window,
    SHARE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, FIELDS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which take (item, kv head) in turn. scale: of base 2 scores."""
    i_M, d_D = tl.arange(0, TILE), tl.arange(0, DP)
    for work in range(tl.program_id(0), tl.load(counts + 1) * KV_HEADS, tl.num_programs(0)):
        item, head = items + work // KV_HEADS * FIELDS, work % KV_HEADS
        start, count, last = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        part, committed, chain = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
        pages = lists + tl.load(item + 8)
        keys = kv + head * PAGE * D
        values = keys + KV_HEADS * PAGE * D

        place_M = i_M // SHARE  # of a query's token in the tile
        real_M = place_M < count
        token_M = start + tl.minimum(place_M, count - 1)
        at_MD = (token_M * KV_HEADS + head)[:, None] * SHARE * D + (i_M % SHARE)[:, None] * D
        at_MD = at_MD.to(tl.int64) + d_D[None, :]
        inside_MD = real_M[:, None] & (d_D < D)[None, :]
        q_MD = tl.load(q + at_MD, mask=inside_MD, other=0.0)
        position_M = tl.load(position + token_M)
        lowest = tl.maximum(tl.min(position_M) - window + 1, 0)
        peak_M = tl.full((TILE,), float("-inf"), tl.float32)
        total_M = tl.zeros((TILE,), tl.float32)
        sum_MD = tl.zeros((TILE, DP), tl.float32)
        for split in range(tl.load(item + 3), tl.load(item + 4)):
            first = tl.maximum(split * SPLIT, lowest // BLOCK * BLOCK)
            end = tl.minimum(split * SPLIT + SPLIT, last + 1)
            common = tl.where(chain > 0, end, tl.minimum(committed // BLOCK * BLOCK, end))
            shared = tl.cdiv(tl.maximum(common - first, 0), BLOCK)
            split_peak_M, split_total_M, split_sum_MD = _attend_split(
                q_MD, keys, values, pages, lists, line + start, position + start, place_M,
                position_M, first, end, shared, count, last, lowest, committed, chain, scale,
                window, KV_HEADS, D, PAGE, BLOCK,
            )  # fmt: skip
            peak_M, total_M, sum_MD = _add_split(
                peak_M, total_M, sum_MD, split_peak_M, split_total_M, split_sum_MD
            )

        if part < 0:
            done_MD = _result(total_M, sum_MD).to(out.dtype.element_ty)
            tl.store(out + at_MD, done_MD, mask=inside_MD)
        else:
            line_M = (part * KV_HEADS + head).to(tl.int64) * TILE + i_M
            tl.store(softmax + line_M * 2, peak_M, mask=real_M)
            tl.store(softmax + line_M * 2 + 1, total_M, mask=real_M)
            tl.store(sums + line_M[:, None] * DP + d_D[None, :], sum_MD, mask=real_M[:, None])


@triton.jit(do_not_specialize_on_alignment=["counts", "items", "position", "item_of"])
def combine_kernel(
    out, counts, items, position, item_of, sums, softmax,
    SHARE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, FIELDS: tl.constexpr, HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens of the bucket, kv heads). Adds a token's parts in order, if it has any."""
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(counts):
        return
    item = items + tl.load(item_of + token) * FIELDS
    part = tl.load(item + 5)
    if part < 0:
        return
    num = tl.load(position + token) // SPLIT + 1 - tl.load(item + 3)
    h_S, d_D = tl.arange(0, HEADS), tl.arange(0, DP)
    row_S = (token - tl.load(item)) * SHARE + h_S  # of the tile
    peak_S = tl.full((HEADS,), float("-inf"), tl.float32)
    total_S = tl.zeros((HEADS,), tl.float32)
    sum_SD = tl.zeros((HEADS, DP), tl.float32)
    for begin in range(0, num, AT_ONCE):
        for more in tl.static_range(AT_ONCE):  # so that their loads are under way together
            split = begin + more
            line_S = ((part + split) * KV_HEADS + head).to(tl.int64) * TILE + row_S
            there_S = (h_S < SHARE) & (split < num)
            m_S = tl.load(softmax + line_S * 2, mask=there_S, other=float("-inf"))
            l_S = tl.load(softmax + line_S * 2 + 1, mask=there_S, other=0.0)
            at_SD = line_S[:, None] * DP + d_D[None, :]
            acc_SD = tl.load(sums + at_SD, mask=there_S[:, None], other=0.0)
            peak_S, total_S, sum_SD = _add_split(peak_S, total_S, sum_SD, m_S, l_S, acc_SD)
    at_S = ((token * KV_HEADS + head) * SHARE + h_S).to(tl.int64) * D
    done_SD = _result(total_S, sum_SD).to(out.dtype.element_ty)
    mask_SD = (h_S < SHARE)[:, None] & (d_D < D)[None, :]
    tl.store(out + at_S[:, None] + d_D[None, :], done_SD, mask=mask_SD)
