"""What a step costs, by its number of tokens. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

_CLIP = 2.0  # a step counts as at most so many times slower, or faster, than expected
_SCALE_WEIGHT = 0.1  # of the newest step, for all points together
_POINT_WEIGHT = 0.02  # of what is left then, for the points beside it


class CostCurve:
    """Seconds over tokens: straight between points, never falling. Not thread-safe.

    Below the first point it is flat, beyond the last it goes on as between the last two.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        """points: measured (tokens, seconds), tokens rising; at least one, seconds above 0."""
        self._tokens = [tokens for tokens, _ in points]
        self._seconds = [seconds for _, seconds in points]
        self._scale = 1.0
        for index in range(1, len(points)):
            self._seconds[index] = max(self._seconds[index - 1 : index + 1])

    @property
    def points(self) -> list[tuple[int, float]]:
        """(tokens, seconds), as refined so far."""
        seconds = [value * self._scale for value in self._seconds]
        return list(zip(self._tokens, seconds, strict=True))

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes."""
        left, share = self._place(tokens)
        if not share:
            return self._scale * self._seconds[left]
        low, high = self._seconds[left : left + 2]
        return self._scale * (low + share * (high - low))

    def least_slope(self, tokens: int) -> float:
        """The least that a further token costs on average, in seconds, however many join a step.

        Nodes that are worth less than this do not pay in any number.
        """
        here, scale = self.seconds(tokens), self._scale
        least = self._last_slope()
        for index in range(bisect_right(self._tokens, tokens), len(self._tokens)):
            slope = (scale * self._seconds[index] - here) / (self._tokens[index] - tokens)
            least = min(least, slope)
        return least

    def record(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took this long."""
        ratio = _clipped(seconds / self.seconds(tokens))
        self._scale *= ratio**_SCALE_WEIGHT
        left, share = self._place(tokens)
        rest = ratio ** ((1 - _SCALE_WEIGHT) * _POINT_WEIGHT)
        self._move(left, rest ** max(1 - share, 0.0))
        if share:
            self._move(left + 1, rest ** min(share, 1.0))

    def _place(self, tokens: int) -> tuple[int, float]:
        """(the point before, the share of the way to the next point; above 1 beyond the last)."""
        last = len(self._tokens) - 1
        left = min(bisect_right(self._tokens, tokens) - 1, last - 1)
        if left < 0:
            return 0, 0.0
        low, high = self._tokens[left : left + 2]
        return left, (tokens - low) / (high - low)

    def _last_slope(self) -> float:
        if len(self._tokens) == 1:
            return 0.0
        (low, high), (cheap, dear) = self._tokens[-2:], self._seconds[-2:]
        return self._scale * (dear - cheap) / (high - low)

    def _move(self, index: int, factor: float) -> None:
        """Multiply a point by `factor`, and move those that it would overtake along."""
        moved = self._seconds[index] * factor
        self._seconds[index] = moved
        for other in range(index):
            self._seconds[other] = min(self._seconds[other], moved)
        for other in range(index + 1, len(self._seconds)):
            self._seconds[other] = max(self._seconds[other], moved)


def _clipped(ratio: float) -> float:
    return min(max(ratio, 1 / _CLIP), _CLIP)
