"""Prompt lookup: how a row's own text went on where its last few tokens stood before. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

SHORTEST, LONGEST = 2, 4  # tokens of the n-grams that are looked up
MATCH_CAP = 16  # tokens; longer matches count as this long


class Continuation(NamedTuple):
    """match: how many of the row's last tokens stood before. tokens: what followed them there."""

    match: int
    tokens: tuple[int, ...]


NOWHERE = Continuation(0, ())


class Lookup:
    """One row's n-grams. A token costs a few dictionary operations and about 0.4 kB.

    An n-gram is known by where it ends, and only once a token follows it, so that it always has a
    continuation.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        for token in tokens:
            self.push(token)

    @property
    def num_tokens(self) -> int:
        """How many tokens were pushed."""
        return len(self._tokens)

    def push(self, token: int) -> None:
        """The row's next token."""
        tokens = self._tokens
        end = len(tokens)
        for length, after in enumerate(self._after, start=SHORTEST):
            if end >= length:
                after[tuple(tokens[end - length :])] = end
        tokens.append(token)

    def find(self, limit: int) -> Continuation:
        """At most `limit` tokens that followed the last ones where they stood before, or NOWHERE.

        Looks for the last 4 tokens, else 3, else 2, and takes the latest place where they stood.
        `match` counts equal tokens before them too, up to MATCH_CAP.
        """
        tokens = self._tokens
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._after[length - SHORTEST].get(tuple(tokens[-length:]))
            if start is not None:
                match = self._match(start, length)
                return Continuation(match, tuple(tokens[start : start + limit]))
        return NOWHERE

    def _match(self, start: int, length: int) -> int:
        """How many tokens before `start` equal the last ones; `length` are known to."""
        tokens, end = self._tokens, len(self._tokens)
        longest = min(start, MATCH_CAP)
        while length < longest and tokens[start - length - 1] == tokens[end - length - 1]:
            length += 1
        return length
