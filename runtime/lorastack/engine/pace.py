"""How many prompt tokens a step takes beside rows that decode, so that these hardly feel it.

A step is taken to last as long as one without prompts, plus a price for each prompt token; both are
learnt from the steps that ran. The budget keeps a step below STRETCH times one without prompts.
Where more rows wait for their prompts than decode, the stretch grows with their ratio: prompts in
small pieces take longer, and what spares one row would hold up many.
"""

from __future__ import annotations

STRETCH = 1.5  # times a step without a prompt; a noisy clock does not make it twice
MOST_STRETCH = 3.0  # however many rows wait
MIN_TOKENS = 16  # prompt tokens that a step takes at least, where there is room
_WEIGHT = 0.2  # of the newest step
_FULL_WEIGHT_TOKENS = 32  # a step of fewer prompt tokens says less about the price of one


class Pace:
    """Learns what steps cost and budgets prompt tokens. Not thread-safe.

    max_tokens: of any step, those of decoding rows included.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._step: float | None = None  # seconds, without a prompt
        self._token: float | None = None  # seconds more for each prompt token

    def budget(self, *, decoding: int, waiting: int) -> int:
        """Prompt tokens of the next step.

        decoding: rows that decode in it. waiting: rows with prompt tokens left. Nothing is held
        back before a step without a prompt was seen.
        """
        most = max(self._max_tokens - decoding, 1)
        if not decoding or self._step is None or not self._token:
            return most
        affordable = int((stretch(decoding, waiting) - 1) * self._step / self._token)
        return min(max(MIN_TOKENS, affordable), most)

    def record(self, *, prompt_tokens: int, decoding: bool, seconds: float) -> None:
        """A step took `seconds`. prompt_tokens: of all its rows. decoding: any of them decoded."""
        if not prompt_tokens:
            if decoding:
                self._step = _moved(self._step, seconds, _WEIGHT)
            return
        token = max(seconds - (self._step or 0.0), 0.0) / prompt_tokens
        share = min(prompt_tokens / _FULL_WEIGHT_TOKENS, 1.0)
        self._token = _moved(self._token, token, _WEIGHT * share)


def stretch(decoding: int, waiting: int) -> float:
    """How many times longer a step may get. decoding, waiting: rows; at least one decodes."""
    return min(1 + (STRETCH - 1) * max(waiting / decoding, 1.0), MOST_STRETCH)


def _moved(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)
