"""How much of prompts a step takes beside rows that decode, so that these hardly feel it.

A step's time is taken as what it costs without prompts plus a price a prompt token; both are learnt
from the steps that ran. The budget keeps the sum below `STRETCH` times the first. Where more rows
wait for their prompts than decode, it is more by as much: prompts in small pieces take longer, and
what spares one row would hold up many.
"""

from __future__ import annotations

STRETCH = 1.5  # of a step without a prompt; with the clock's noise less than twice
MOST_STRETCH = 3.0  # however many rows wait
MIN_TOKENS = 16  # a prompt always goes on: by so many where there is room
_WEIGHT = 0.2  # of the newest step
_FULL_WEIGHT_TOKENS = 32  # fewer prompt tokens say less about the price of one


class Pace:
    """Not thread-safe. max_tokens: of any step, those of rows that decode included."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._step: float | None = None  # seconds, without a prompt
        self._token: float | None = None  # seconds more for each prompt token

    def budget(self, *, decoding: int, waiting: int) -> int:
        """Prompt tokens of the next step.

        decoding: rows that make a token in it. waiting: rows with prompt tokens left. Nothing is
        held back before a step without a prompt was seen.
        """
        most = max(self._max_tokens - decoding, 1)
        if not decoding or self._step is None or not self._token:
            return most
        affordable = int((stretch(decoding, waiting) - 1) * self._step / self._token)
        return min(max(MIN_TOKENS, affordable), most)

    def record(self, *, prompt_tokens: int, decoding: bool, seconds: float) -> None:
        """What a step took. prompt_tokens: of all its rows."""
        if not prompt_tokens:
            if decoding:
                self._step = _moved(self._step, seconds, _WEIGHT)
            return
        token = max(seconds - (self._step or 0.0), 0.0) / prompt_tokens
        share = min(prompt_tokens / _FULL_WEIGHT_TOKENS, 1.0)
        self._token = _moved(self._token, token, _WEIGHT * share)


def stretch(decoding: int, waiting: int) -> float:
    """Of a step, by the numbers of rows that decode, at least one, and that wait."""
    return min(1 + (STRETCH - 1) * max(waiting / decoding, 1.0), MOST_STRETCH)


def _moved(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)
