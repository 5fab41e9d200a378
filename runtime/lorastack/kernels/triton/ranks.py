"""Keys that put tokens in one strict order, as integers: by logit, ties by the lower id."""

from __future__ import annotations

import triton
import triton.language as tl

LAST_ID = tl.constexpr(0x7FFFFFFF)
BEHIND_ALL = tl.constexpr(0)  # below every key


@triton.jit
def rank_of(logits):
    """uint32 in the order of float32 logits; -0 is 0. NaN: whatever it is, the caller replaces it."""
    logits = tl.where(logits == 0.0, 0.0, logits)
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
