"""The best of each pair's logits, and their log-probabilities; contract: `kernels.heads`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.heads_plan import Pairs
from lorastack.kernels.triton.launch import launch
from lorastack.kernels.triton.ranks import BEHIND_ALL, key_of, limit_of, rank_of
from lorastack.layout import MAX_RANK

BLOCK = 2048  # outputs of a pair that are ranked at once


def top(logits_YN: Tensor, pairs: Pairs, ids_YR: Tensor, logprobs_YR: Tensor, bucket: int) -> None:
    """Fills ids_YR, int32, and logprobs_YR, float32, of at most `bucket` pairs with R tokens each.

    R: at most MAX_RANK, for which there is one kernel. Both have equal strides.
    """
    num = ids_YR.shape[1]
    assert num <= MAX_RANK, "more tokens than the kernel ranks"
    launch(
        *(top_kernel, (bucket,), logits_YN, logits_YN.stride(0), pairs.num_outputs_Y, pairs.ids_Y),
        *(pairs.counts, ids_YR, logprobs_YR, ids_YR.stride(0), num),
        RANK=MAX_RANK,
        BLOCK=BLOCK,
        num_warps=8,
    )


# Results stand anywhere: one kernel serves all places.
@triton.jit(
    do_not_specialize=["stride", "out_stride", "num"],
    do_not_specialize_on_alignment=["out_ids", "out_logprobs"],
)
def top_kernel(
    logits,
    stride,
    num_outputs,
    tokens,
    counts,
    out_ids,
    out_logprobs,
    out_stride,
    num,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: pairs. Finds the best places in any order, and then their order."""
    pair = tl.program_id(0).to(tl.int64)
    if pair >= tl.load(counts + 2):
        return
    logits += pair * stride
    out_ids += pair * out_stride
    out_logprobs += pair * out_stride
    size = tl.load(num_outputs + pair)
    found = tl.minimum(num, size)
    limit = tl.full((), BEHIND_ALL, tl.uint64)
    if found < size:
        limit = limit_of(logits, found, size, BLOCK)
    peak, total = _collect(logits, limit, size, out_ids, BLOCK)
    tl.debug_barrier()
    i = tl.arange(0, RANK)
    places = tl.load(out_ids + i, mask=i < found, other=0).to(tl.int64)
    x = tl.load(logits + places, mask=i < found, other=0.0)
    logprobs = x - peak - total
    keys = tl.where(i < found, key_of(rank_of(x), places), BEHIND_ALL)
    order = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), 1)
    address = tl.load(tokens + pair)
    if address != 0:
        places = tl.load(address.to(tl.pointer_type(tl.int64)) + places, mask=i < found, other=0)
    tl.debug_barrier()
    tl.store(out_ids + order, places.to(tl.int32), mask=i < found)
    tl.store(out_logprobs + order, logprobs, mask=i < found)
    # The best stands for what is missing.
    best = tl.sum(tl.where(order == 0, places, 0), 0)
    logprob = tl.sum(tl.where(order == 0, logprobs, 0.0), 0)
    missing = (i >= found) & (i < num)
    tl.store(out_ids + i, tl.where(missing, best, 0).to(tl.int32), mask=missing)
    tl.store(out_logprobs + i, tl.where(missing, logprob, 0.0), mask=missing)


@triton.jit
def _collect(logits, limit, size, out, BLOCK: tl.constexpr):
    """Writes the places whose keys are above `limit`. The best logit, and the logarithm of the sum
    of all e^(logit - best), NaN where a logit is not finite."""
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    odd = tl.zeros((), tl.int32)
    num = tl.zeros((), tl.int32)
    for begin in range(0, size, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        real = places < size
        x = tl.load(logits + places, mask=real, other=float("-inf"))
        keys = tl.where(real, key_of(rank_of(x), places), BEHIND_ALL)
        if tl.max(keys, 0) > limit:
            above = (keys > limit).to(tl.int32)
            tl.store(out + num + tl.cumsum(above, 0) - 1, places, mask=above > 0)
            num += tl.sum(above, 0)
        finite = tl.abs(x) < float("inf")
        odd += tl.sum((real & (finite == 0)).to(tl.int32), 0)
        x = tl.where(finite, x, float("-inf"))
        most = tl.maximum(peak, tl.max(x, 0))
        safe = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(x - safe), 0)
        peak = most
    return peak, tl.where(odd > 0, float("nan"), tl.log(total))
