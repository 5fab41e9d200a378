"""What one row's heads say for its next positions. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that the heads find likely, [head][rank], best first; head 0 speaks of the next token.

    logprobs: natural logarithms, over the tokens that the head chooses from.
    """

    ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
