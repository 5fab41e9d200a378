"""Where rows stand in their grammar: request.Grammar and request.Matcher over llguidance."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher


class CompiledGrammar:
    """A grammar that its rows share; see request.Grammar."""

    def __init__(self, start: LLMatcher, end_ids: frozenset[int], vocab_size: int) -> None:
        """start: at the beginning of the text; it stays there. vocab_size: the model's outputs."""
        self._start = start
        self._copying = threading.Lock()
        self._end_ids = end_ids
        self._only_ends = bitmask(end_ids, vocab_size)

    def matcher(self) -> RowMatcher:
        """A fresh one, in microseconds."""
        with self._copying:  # llguidance's objects refuse two threads at once
            copy = self._start.deep_copy()
        return RowMatcher(copy, self._end_ids, self._only_ends)


class RowMatcher:
    """One row's place; see request.Matcher.

    llguidance stands behind the tokens before the row's first end token: it counts end tokens in
    its own way, so it is not given any.
    """

    def __init__(self, inner: LLMatcher, end_ids: frozenset[int], only_ends: bytes) -> None:
        self.error = ""
        self._inner = inner
        self._end_ids = end_ids
        self._only_ends = only_ends
        self._path: tuple[int, ...] = ()  # behind the committed tokens, before an end token
        self._ended = False  # an end token follows `_path`
        self._has_ended = False  # one was committed

    def seek(self, path: Sequence[int]) -> None:
        """Raises ValueError for a path that the grammar does not allow; the place is then lost
        until the next call."""
        text = [] if self._has_ended else self._before_end(path)
        self._ended = self._has_ended or len(text) < len(path)
        common = _common_prefix(self._path, text)
        if self.error:
            return
        if dropped := len(self._path) - common:
            self._inner.rollback(dropped)
        num_taken = self._inner.try_consume_tokens(text[common:])
        self._path = tuple(text[: common + num_taken])
        if num_taken < len(text) - common and not self._gave_up():
            raise ValueError(f"token {text[len(self._path)]} does not follow the grammar")

    def commit(self, tokens: Sequence[int]) -> None:
        self.seek(tokens)
        self._has_ended = self._ended
        self._path = ()

    def mask(self) -> bytes:
        if self.finished:
            return self._only_ends
        # llguidance gives room for one more word at times.
        mask = self._inner.compute_bitmask()[: len(self._only_ends)]
        return self._only_ends if self._gave_up() else mask

    def forced(self, limit: int) -> tuple[int, ...]:
        self.seek(())
        if self.finished:
            return ()
        tokens = self._inner.compute_ff_tokens()
        return () if self._gave_up() else tuple(tokens[:limit])

    @property
    def finished(self) -> bool:
        return self._ended or bool(self.error) or self._inner.is_stopped()

    def _before_end(self, path: Sequence[int]) -> list[int]:
        length = next((i for i, token in enumerate(path) if token in self._end_ids), len(path))
        return list(path[:length])

    def _gave_up(self) -> bool:
        """llguidance hit one of its limits, or the vocabulary's, and does not come back from it."""
        if self._inner.is_error():
            cause = self._inner.get_error().partition("\n")[0]
            self.error = f"the grammar could not be followed any further: {cause}"
        return bool(self.error)


def bitmask(ids: Collection[int], vocab_size: int) -> bytes:
    """Bit i % 8 of byte i // 8 for each id, in ceil(vocab_size / 32) words of 4 bytes."""
    bits = sum(1 << index for index in set(ids))
    return bits.to_bytes(-(-vocab_size // 32) * 4, "little")


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
