"""Keys that put tokens in one strict order, as integers: by logit, ties by the lower id."""

from __future__ import annotations

import triton
import triton.language as tl

LAST_ID = tl.constexpr(0x7FFFFFFF)
BEHIND_ALL = tl.constexpr(0)  # below every key


@triton.jit
def rank_of(logits):
    """uint32 in the order of float32 logits. -0 is 0, NaN is minus infinity."""
    logits = tl.where(logits == 0.0, 0.0, logits)
    logits = tl.where(logits != logits, float("-inf"), logits)
    bits = logits.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def key_of(ranks, ids):
    """uint64, above 0, no two alike: a token comes before those with lower keys."""
    return (ranks.to(tl.uint64) << 32) | (ids ^ LAST_ID).to(tl.uint64)


@triton.jit
def id_of(keys):
    """The ids of keys, int64."""
    return (keys & LAST_ID).to(tl.int64) ^ LAST_ID


@triton.jit
def limit_of(logits, num, size, BLOCK: tl.constexpr):
    """The key below that of the num-th of `size` logits: so many have keys above it. num: int32.

    Digit by digit, 8 bits of the ranks a pass.
    """
    digits = tl.arange(0, 256)
    rank = tl.zeros((), tl.uint32)  # of the last token that stays, from its highest digit on
    left = num  # how many tokens stay of those whose ranks begin so
    for place in range(4):
        shift = 24 - 8 * place
        counts = tl.zeros((256,), tl.int32)
        for begin in range(0, size, BLOCK):
            ids = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + ids, mask=ids < size, other=0.0)
            ranks = rank_of(x) >> shift
            same = (ids < size) & (ranks >> 8 == rank)
            counts += tl.histogram((ranks & 255).to(tl.int32), 256, mask=same)
        reaching = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((reaching >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        rank = (rank << 8) | digit.to(tl.uint32)
    # Of the tokens with that very logit the `left` first stay.
    last = tl.zeros((), tl.int32)
    seen = tl.zeros((), tl.int32)
    for begin in range(0, size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < size, other=0.0)
        level = ((ids < size) & (rank_of(x) == rank)).to(tl.int32)
        if seen < left:
            places = seen + tl.cumsum(level, 0)
            last = tl.maximum(last, tl.max(tl.where((level > 0) & (places == left), ids, 0), 0))
            seen += tl.sum(level, 0)
    return key_of(rank, last) - 1
