"""Gumbel noise as a function of (seed, generated index, token id) and of nothing else.

argmax(logit / T + noise) over the tokens that are left is a draw from softmax(logit / T). A token
meets the same noise at the same position whatever else the batch, the step or a tree holds: so
speculation cannot change a draw, and rounding of the logits hardly ever does.

The stream of a position is splitmix64 (Steele, Lea, Flood 2014) at counter = token id, started at a
mix of seed and index.
"""

from __future__ import annotations

from torch import Tensor

_MASK = (1 << 64) - 1
_INDEX_STEP = 0xD1B54A32D192ED03  # odd, unlike _TOKEN_STEP: positions do not shift into each other
_TOKEN_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, splitmix64's own
_MULTIPLIER1, _MULTIPLIER2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def gumbel(seed: int, index: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, in the shape of `token_ids` (int64).

    seed: its low 64 bits count. index: of the generated token, from 0.
    """
    state = token_ids * _signed(_TOKEN_STEP)  # int64 arithmetic wraps around
    state += _signed(stream(seed, index))
    state ^= _shift_right(state, 30)
    state *= _signed(_MULTIPLIER1)
    state ^= _shift_right(state, 27)
    state *= _signed(_MULTIPLIER2)
    state ^= _shift_right(state, 31)
    # 52 bits and a half: exact in float64, never 0 nor 1, so that both logarithms are finite.
    uniform = _shift_right(state, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def stream(seed: int, index: int) -> int:
    """The 64 bits at which the stream of a position starts."""
    return _mix(_mix(seed) + (index + 1) * _INDEX_STEP)


def hash_reference(seed: int, index: int, token_id: int) -> int:
    """The 64 bits behind one token's noise, in plain integers."""
    return _mix(stream(seed, index) + token_id * _TOKEN_STEP)


def uniform_reference(bits: int) -> float:
    """The number in (0, 1) that the 64 bits of `hash_reference` stand for."""
    return ((bits >> 12) + 0.5) * 2.0**-52


def _mix(state: int) -> int:
    state &= _MASK
    state = ((state ^ (state >> 30)) * _MULTIPLIER1) & _MASK
    state = ((state ^ (state >> 27)) * _MULTIPLIER2) & _MASK
    return state ^ (state >> 31)


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
