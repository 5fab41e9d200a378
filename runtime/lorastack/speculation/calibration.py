"""How often the tokens of a source are those that the model samples, learnt in serving. Pure.

Heads say how likely each of their candidates is, and err with the text: on text they were not
trained for by a factor of five. So a candidate's own probability is multiplied by what such
candidates turned out to be worth: accepted / expected, by head and by the logarithm of the
probability, both fading as new ones come. A candidate counts once the path before it is accepted,
in the tree or not: the sample there shows whether it was right.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from lorastack.speculation.proposal import Proposal

NUM_WORTHS = 16  # best nodes of a proposal whose mean worths are kept

_VERSION = 1
_MAX_HEADS = 64  # deeper ones count as the last
_NUM_BINS = 8  # a bin is as wide as one natural logarithm
_MATCHES = (2, 3, 4, 6, 10, 16)  # matches are told apart by the greatest of these they reach
_MAX_DEPTH = 4  # looked-up tokens that are told apart; deeper ones count as the last
_PRIOR = 8.0  # weight of the default that a cell starts with, in expected acceptances at most
_PRIOR_SEEN = 50.0  # the same in candidates at most, so that unlikely ones are learnt soon too
_MEMORY = 400.0  # expected acceptances after which an old one counts a third
_WORTH_WEIGHT = 0.02  # of the newest proposal
_FAMILIAR = 1 - (1 - _WORTH_WEIGHT) ** 64  # the weight of 64 proposals
_SURE = 0.99  # the greatest probability of anything
_LEAST = 1e-3  # expected acceptances of any cell

# What a cell says that has seen nothing: measured with heads on held-out text of their domain.
_DEFAULT_RATIO = 0.9
# The same for prompt lookup, by _MATCHES: of its first token, and of each that follows.
_LOOKUP_FIRST = (0.30, 0.45, 0.55, 0.65, 0.75, 0.85)
_LOOKUP_NEXT = (0.55, 0.65, 0.70, 0.80, 0.85, 0.90)


class _Cells:
    """Acceptances of a few kinds of candidates, real and expected: fading sums, and ratios."""

    __slots__ = ("accepted", "expected", "ratios")

    def __init__(self, accepted: Sequence[float], expected: Sequence[float]) -> None:
        self.accepted = list(accepted)
        self.expected = list(expected)
        self.ratios = [a / e for a, e in zip(accepted, expected, strict=True)]

    def copy(self) -> _Cells:
        return _Cells(self.accepted, self.expected)

    def record(self, cell: int, probability: float, *, accepted: bool) -> None:
        keep = 1.0 - probability / _MEMORY
        self.accepted[cell] = right = self.accepted[cell] * keep + accepted
        self.expected[cell] = hoped = self.expected[cell] * keep + probability
        self.ratios[cell] = right / hoped


class Calibration:
    """What is known about one heads digest, or about rows without heads. Not thread-safe."""

    def __init__(self) -> None:
        self._heads: list[_Cells] = []
        self._lookup = [
            _Cells(
                [_PRIOR * p for p in (first, *[after] * (_MAX_DEPTH - 1))], [_PRIOR] * _MAX_DEPTH
            )
            for first, after in zip(_LOOKUP_FIRST, _LOOKUP_NEXT, strict=True)
        ]
        self._worths = [0.0] * NUM_WORTHS
        self._worth_weights = [0.0] * NUM_WORTHS
        self._means: tuple[float, ...] | None = None  # `mean_worths`, until the next proposal

    # -- heads ------------------------------------------------------------------------------------

    def probabilities(self, head: int, logprobs: Sequence[float]) -> list[float]:
        """The chance of each candidate of a head (0-based), once the path before it is accepted."""
        ratios = self._cells(head).ratios
        return [min(math.exp(log) * ratios[_bin(log)], _SURE) for log in logprobs]

    def record(self, head: int, logprob: float, accepted: bool) -> None:
        """Count one candidate whose path was accepted. accepted: the sample there equalled it."""
        self._cells(head).record(_bin(logprob), math.exp(logprob), accepted=accepted)

    def record_proposal(self, proposal: Proposal, sampled: Sequence[int]) -> None:
        """Compare a proposal with the step's samples: the accepted tokens and the last one."""
        by_head = zip(proposal.ids, proposal.logprobs, sampled, strict=False)
        for head, (tokens, logs, token) in enumerate(by_head):
            record = self._cells(head).record
            for candidate, log in zip(tokens, logs, strict=True):
                record(_bin(log), math.exp(log), accepted=candidate == token)

    def _cells(self, head: int) -> _Cells:
        heads = self._heads
        head = min(head, _MAX_HEADS - 1)
        while len(heads) <= head:
            priors = [min(_PRIOR, _PRIOR_SEEN * math.exp(-bin - 0.5)) for bin in range(_NUM_BINS)]
            heads.append(_Cells([_DEFAULT_RATIO * prior for prior in priors], priors))
        return heads[head]

    # -- prompt lookup ----------------------------------------------------------------------------

    def lookup_probability(self, match: int, depth: int) -> float:
        """The chance of a looked-up token once those before it are accepted. depth: from 0."""
        return min(self._lookup[_match(match)].ratios[min(depth, _MAX_DEPTH - 1)], _SURE)

    def record_lookup(self, match: int, tokens: Sequence[int], sampled: Sequence[int]) -> None:
        """Compare a continuation with the step's samples: the accepted tokens and the last one."""
        for depth, (token, sample) in enumerate(zip(tokens, sampled, strict=False)):
            cell = min(depth, _MAX_DEPTH - 1)
            self._lookup[_match(match)].record(cell, 1.0, accepted=token == sample)
            if token != sample:
                return

    # -- worths -----------------------------------------------------------------------------------

    @property
    def familiar(self) -> bool:
        """True if enough proposals were recorded to tell what they are worth."""
        return self._worth_weights[0] >= _FAMILIAR

    @property
    def mean_worths(self) -> tuple[float, ...]:
        """Of the best node, the second best, and so on, non-increasing; 0 where none was seen."""
        if self._means is None:
            worths, best = [], 1.0
            for total, weight in zip(self._worths, self._worth_weights, strict=True):
                best = min(best, total / weight if weight else 0.0)
                worths.append(best)
            self._means = tuple(worths)
        return self._means

    def record_worths(self, worths: Iterable[float]) -> None:
        """Take in the worths of one row's candidates, best first, as many as were made."""
        self._means = None
        for index, worth in zip(range(NUM_WORTHS), worths, strict=False):
            self._worths[index] += _WORTH_WEIGHT * (worth - self._worths[index])
            self._worth_weights[index] += _WORTH_WEIGHT * (1 - self._worth_weights[index])

    # -- storage ----------------------------------------------------------------------------------

    def copy(self) -> Calibration:
        """A copy; much cheaper than `to_json`."""
        copied = Calibration()
        copied._heads = [cells.copy() for cells in self._heads]
        copied._lookup = [cells.copy() for cells in self._lookup]
        copied._worths = self._worths.copy()
        copied._worth_weights = self._worth_weights.copy()
        return copied

    def to_json(self) -> str:
        """What `from_json` reads: at most about 50 kB, however many heads there are."""
        state = {
            "version": _VERSION,
            "heads": [_dumped(cells) for cells in self._heads],
            "lookup": [_dumped(cells) for cells in self._lookup],
            "worths": list(zip(self._worths, self._worth_weights, strict=True)),
        }
        return json.dumps(state)

    @staticmethod
    def from_json(text: str) -> Calibration:
        """The calibration that `to_json` wrote; a fresh one from any other text."""
        try:
            return Calibration.parse(text)
        except ValueError:
            return Calibration()

    @staticmethod
    def parse(text: str) -> Calibration:
        """The calibration that `to_json` wrote. Raises ValueError for any other text."""
        try:
            state = json.loads(text)
            if state["version"] != _VERSION or len(state["heads"]) > _MAX_HEADS:
                raise ValueError(f"not version {_VERSION}, or too many heads")
            restored = Calibration()
            restored._heads = [_loaded(cells, _NUM_BINS) for cells in state["heads"]]
            restored._lookup = [_loaded(cells, _MAX_DEPTH) for cells in state["lookup"]]
            pairs = [
                (_number(worth, 0.0, 1.0), _number(weight, 0.0, 1.0))
                for worth, weight in state["worths"]
            ]
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError("a field is missing, or not of its type") from error
        if len(restored._lookup) != len(_MATCHES) or len(pairs) != NUM_WORTHS:
            raise ValueError("too many or too few numbers")
        restored._worths = [worth for worth, _ in pairs]
        restored._worth_weights = [weight for _, weight in pairs]
        return restored

    @property
    def num_heads(self) -> int:
        """How many heads it knows anything of."""
        return len(self._heads)


def _bin(logprob: float) -> int:
    return int(-logprob) if logprob > -_NUM_BINS else _NUM_BINS - 1


def _match(length: int) -> int:
    """length: at least the shortest of _MATCHES."""
    return bisect_right(_MATCHES, length) - 1


def _dumped(cells: _Cells) -> list[list[float]]:
    return [cells.accepted, cells.expected]


def _loaded(value: Any, count: int) -> _Cells:
    """The `count` cells that `_dumped` wrote. Raises ValueError or TypeError for anything else."""
    accepted, expected = value
    if not len(accepted) == len(expected) == count:
        raise ValueError("too many or too few numbers")
    return _Cells(
        [_number(number, 0.0, 1e9) for number in accepted],
        [_number(number, _LEAST, 2 * _MEMORY) for number in expected],
    )


def _number(value: Any, low: float, high: float) -> float:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"a number is not between {low:g} and {high:g}")
    return float(value)
