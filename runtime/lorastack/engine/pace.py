"""How much of a prompt a step takes beside rows that decode, so that none of them feels it.

A step's time is taken as what it costs without a prompt plus a price a prompt token; both are
learnt from the steps that ran. The budget keeps the sum below `STRETCH` times the first.
"""

from __future__ import annotations

STRETCH = 1.5  # of a step without a prompt; with the clock's noise less than twice
MIN_TOKENS = 16  # a prompt always goes on
_WEIGHT = 0.2  # of the newest step
_FULL_WEIGHT_TOKENS = 32  # fewer prompt tokens say less about the price of one


class Pace:
    """Not thread-safe. max_tokens: of prompts in any step."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._step: float | None = None  # seconds, without a prompt
        self._token: float | None = None  # seconds more for each prompt token

    def budget(self, *, decoding: bool) -> int:
        """Prompt tokens of the next step. decoding: some row makes a token in it.

        Nothing is held back before a step without a prompt was seen.
        """
        if not decoding or self._step is None or not self._token:
            return self._max_tokens
        affordable = int((STRETCH - 1) * self._step / self._token)
        return max(MIN_TOKENS, min(affordable, self._max_tokens))

    def record(self, *, prompt_tokens: int, decoding: bool, seconds: float) -> None:
        """What a step took. prompt_tokens: of all its rows."""
        if not prompt_tokens:
            if decoding:
                self._step = _moved(self._step, seconds, _WEIGHT)
            return
        token = max(seconds - (self._step or 0.0), 0.0) / prompt_tokens
        share = min(prompt_tokens / _FULL_WEIGHT_TOKENS, 1.0)
        self._token = _moved(self._token, token, _WEIGHT * share)


def _moved(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)
