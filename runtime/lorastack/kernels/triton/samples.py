"""The token at each node of a step's trees, on the device: the best one, or one that is drawn.

Contracts: `kernels.best` and `kernels.sample`, of float32 logits. Hash and uniform equal
`kernels.gumbel` bit for bit; its two logarithms are the device's own, within an ulp of the CPU's.
Two launches a step: `best_kernel` spreads every row over programs of SPAN tokens, then a program a
row joins what they found and draws.

A draw is a few passes over its row, which a cache holds. `_survey` gives the best score among the
tokens that rank before a limit, and their weight. One pass serves a temperature alone. With top_p a
second tells whether the winner is inside the run: if not, the best before it is the next to try.
All sums are float64, in an order that depends on the vocabulary alone.

typical_p is left to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lorastack.kernels.triton.launch import cdiv, float_bits, launch, power_of_two
from lorastack.kernels.triton.ranks import BEHIND_ALL, id_of, key_of, limit_of, rank_of
from lorastack.request import SamplingParams

SPAN = 4096  # tokens of a row that a program of `best_kernel` reads
SETTINGS = 6  # int64 words of a tree, see `settings_of`
BLOCK = 2048  # of its tokens that `sample_kernel` reads at once
SAMPLE_WARPS = 16
_WORDS = tl.constexpr(SETTINGS)
_NAN_RANK = tl.constexpr(0xFFFFFFFF)
_INDEX_STEP = tl.constexpr(0xD1B54A32D192ED03)
_TOKEN_STEP = tl.constexpr(0x9E3779B97F4A7C15)


class Nodes(NamedTuple):
    """What the step's outputs are sampled by, on the device.

    tree_X: int32, the tree that an output is a node of, or -1: its best token is wanted, no more.
    depth_X: int32, of the node in its tree, the root's is 0. settings_BS: int64, see `settings_of`.
    num_outputs: int32 [1].
    """

    tree_X: Tensor
    depth_X: Tensor
    settings_BS: Tensor
    num_outputs: Tensor


class Sampled(NamedTuple):
    """peaks_X: float32, the best logits, NaN in a row that holds NaN. best_X, tokens_X: int32, the
    best token and the sampled one."""

    peaks_X: Tensor
    best_X: Tensor
    tokens_X: Tensor


def settings_of(params: SamplingParams, token_index: int) -> tuple[int, ...]:
    """SETTINGS signed words that say how a tree is sampled, without typical_p.

    token_index: of the root's sample.
    """
    seed = params.seed & (1 << 64) - 1
    return (
        seed - (seed >> 63 << 64),
        float_bits(params.temperature),
        float_bits(params.top_p),
        float_bits(params.min_p),
        params.top_k,
        token_index,
    )


def num_spans(vocab_size: int) -> int:
    """How many keys a row has, see `sample`."""
    return cdiv(vocab_size, SPAN)


def sample(logits_XV: Tensor, nodes: Nodes, keys_XS: Tensor, out: Sampled, bucket: int) -> None:
    """Fills `out` for the step's outputs, at most `bucket`.

    logits_XV: float32, rows contiguous. keys_XS: workspace, int64 [bucket, num_spans(V)].
    """
    vocab, spans = logits_XV.shape[1], keys_XS.shape[1]
    launch(
        *(best_kernel, (bucket, spans), logits_XV, logits_XV.stride(0), keys_XS),
        *(nodes.num_outputs, vocab),
        SPAN=SPAN,
        num_warps=8,
    )
    launch(
        *(sample_kernel, (bucket,), logits_XV, logits_XV.stride(0), keys_XS, *nodes, *out),
        *(vocab, spans),
        SPANS=power_of_two(spans),
        BLOCK=BLOCK,
        num_warps=SAMPLE_WARPS,
    )


# How many outputs there are stands anywhere: one kernel serves all places.
@triton.jit(do_not_specialize=["stride_x", "vocab"], do_not_specialize_on_alignment=["num_outputs"])
def best_kernel(logits, stride_x, keys, num_outputs, vocab, SPAN: tl.constexpr):
    """Grid: outputs, spans. The key of the span's best token; NaN is best of all."""
    row, span = tl.program_id(0), tl.program_id(1)
    if row >= tl.load(num_outputs):
        return
    ids = span * SPAN + tl.arange(0, SPAN)
    real = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * stride_x + ids, mask=real, other=0.0)
    ranks = tl.where(x != x, _NAN_RANK, rank_of(x))
    key = tl.max(tl.where(real, key_of(ranks, ids), BEHIND_ALL), 0)
    tl.store(keys + row * tl.num_programs(1) + span, key.to(tl.int64, bitcast=True))


@triton.jit(
    do_not_specialize=["stride_x", "vocab", "spans"],
    do_not_specialize_on_alignment=["num_outputs"],
)
def sample_kernel(
    logits,
    stride_x,
    keys,
    trees,
    depths,
    settings,
    num_outputs,
    peaks,
    best,
    tokens,
    vocab,
    spans,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: outputs."""
    row = tl.program_id(0)
    if row >= tl.load(num_outputs):
        return
    logits += row.to(tl.int64) * stride_x
    s = tl.arange(0, SPANS)
    found = tl.load(keys + row * spans + s, mask=s < spans, other=0).to(tl.uint64, bitcast=True)
    first = id_of(tl.max(found, 0))
    peak = tl.load(logits + first)
    tl.store(peaks + row, peak)
    tl.store(best + row, first.to(tl.int32))
    tl.store(tokens + row, first.to(tl.int32))
    tree = tl.load(trees + row)
    if tree < 0:
        return
    settings += tree * _WORDS
    temperature = tl.load(settings + 1).to(tl.float64, bitcast=True)
    top = peak.to(tl.float64) / tl.where(temperature > 0, temperature, 1.0)
    # Else the row is greedy, or there is nothing to draw from: NaN, infinity, or next to 0.
    if (temperature > 0) & (tl.abs(top) < float("inf")):
        start = _start(tl.load(settings), tl.load(settings + 5) + tl.load(depths + row))
        top_p = tl.load(settings + 2).to(tl.float64, bitcast=True)
        min_p = tl.load(settings + 3).to(tl.float64, bitcast=True)
        top_k = tl.load(settings + 4)
        limited = top_p < 1
        winner = tl.full((), BEHIND_ALL, tl.uint64)  # before its first guess: all that top_k leaves
        if (top_k > 0) & (top_k < vocab):
            winner = limit_of(logits, top_k.to(tl.int32), vocab, BLOCK)
        first_key = key_of(rank_of(peak), first)
        enough = tl.zeros((), tl.float64)
        outside = True
        while outside:
            weight, before = _survey(
                *(logits, winner, peak, first_key, start, temperature, limited, min_p, vocab, BLOCK)
            )
            outside = weight >= enough
            winner = tl.where(outside, before, winner)
            enough = tl.where(enough == 0, tl.maximum(top_p * weight, 1e-300), enough)
            outside = outside & limited
        tl.store(tokens + row, id_of(winner).to(tl.int32))


@triton.jit
def _survey(
    logits,
    limit,
    peak,
    first_key,
    start,
    temperature,
    limited,
    min_p,
    vocab,
    BLOCK: tl.constexpr,
):
    """Of the tokens with keys above `limit`: their weight, if that is wanted (`limited`), and the
    key of the best score among those that min_p leaves.

    peak, first_key: the row's first token, which has weight 1 and is always left.

    Noise is -log E with E = -log(uniform), which is at least 1 - uniform. So float32 tells of most
    blocks that none of their tokens reaches the best score so far; only the others are scored in
    float64. The bound is too high by its rounding, which is far below a thousandth for tokens that
    can win: their logit / T is at most 41 below the peak's.
    """
    top = peak.to(tl.float64) / temperature
    inverse = tl.minimum(1 / temperature, 3.4e38).to(tl.float32)
    weight = tl.zeros((), tl.float64)
    winner = first_key
    best = top + _gumbel(start, id_of(first_key))
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
        keys = tl.where(ids < vocab, key_of(rank_of(x), ids), BEHIND_ALL)
        if tl.max(keys, 0) > limit:
            before = keys > limit
            if limited:
                weights = tl.exp(x.to(tl.float64) / temperature - top)
                weight += tl.sum(tl.where(before, weights, 0.0), 0)
            bound = tl.maximum(x - peak, -3.4e38) * inverse - tl.log(_rest(start, ids))
            bound = tl.max(tl.where(before, bound, float("-inf")), 0)
            if bound + 1e-3 >= (best - top).to(tl.float32):
                scaled = x.to(tl.float64) / temperature
                left = before & (tl.exp(scaled - top) >= min_p)
                scores = tl.where(left, scaled + _gumbel(start, ids), float("-inf"))
                most = tl.max(scores, 0)
                holder = tl.max(tl.where(scores == most, keys, BEHIND_ALL), 0)
                better = (most > best) | ((most == best) & (holder > winner))
                best = tl.where(better, most, best)
                winner = tl.where(better, holder, winner)
    return weight, winner


@triton.jit
def _start(seed, index):
    """`kernels.gumbel.stream`. seed, index: int64."""
    return _mix(_mix(seed.to(tl.uint64, bitcast=True)) + (index + 1).to(tl.uint64) * _INDEX_STEP)


@triton.jit
def _gumbel(start, ids):
    """`kernels.gumbel.gumbel` of a stream, float64."""
    uniform = (_bits_of(start, ids).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _rest(start, ids):
    """1 - the uniform of the same, rounded to float32."""
    return ((_bits_of(start, ids) ^ 0xFFFFFFFFFFFFF).to(tl.float32) + 0.5) * 2.220446049250313e-16


@triton.jit
def _bits_of(start, ids):
    """The 52 bits of a uniform."""
    return _mix(start + ids.to(tl.uint64) * _TOKEN_STEP) >> 12


@triton.jit
def _mix(state):
    """splitmix64: uint64 arithmetic wraps around, shifts are logical."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)
