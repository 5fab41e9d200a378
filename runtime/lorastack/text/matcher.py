"""request.Grammar and request.Matcher over llguidance: where each row stands in its grammar."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from lorastack.text.allowance import Allowance, Clock

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CAUSE_CHARS = 300

P = ParamSpec("P")
T = TypeVar("T")


class CompiledGrammar:
    """A grammar that its rows share; see request.Grammar."""

    def __init__(
        self,
        start: LLMatcher,
        end_ids: frozenset[int],
        vocab_size: int,
        clock: Clock | None = None,
    ) -> None:
        """start: stays at the beginning of the text. vocab_size: the model's outputs."""
        self._start = start
        self._copying = threading.Lock()
        self._end_ids = end_ids
        self._only_ends = bitmask(end_ids, vocab_size)
        self._clock = clock or Clock()

    def matcher(self) -> RowMatcher:
        """A matcher for a new row; takes microseconds."""
        with self._copying:  # llguidance's objects refuse two threads at once
            copy = self._start.deep_copy()
        return RowMatcher(copy, self._end_ids, self._only_ends, Allowance(self._clock))


class RowMatcher:
    """One row's place in its grammar; see request.Matcher.

    llguidance stands behind the tokens before the row's first end token: it counts end tokens in
    its own way, so it is not given any.
    """

    def __init__(
        self, inner: LLMatcher, end_ids: frozenset[int], only_ends: bytes, allowance: Allowance
    ) -> None:
        self.error = ""
        self._inner = inner
        self._end_ids = end_ids
        self._only_ends = only_ends
        self._allowance = allowance
        self._path: tuple[int, ...] = ()  # tokens since the commit, before an end token
        self._ended = False  # an end token follows `_path`
        self._has_ended = False  # an end token was committed

    def seek(self, path: Sequence[int]) -> None:
        """Raises ValueError for a path that the grammar does not allow; the place is then lost
        until the next call."""
        text = [] if self._has_ended else self._before_end(path)
        self._ended = self._has_ended or len(text) < len(path)
        common = _common_prefix(self._path, text)
        if self.error:
            return
        if dropped := len(self._path) - common:
            self._ask(self._inner.rollback, dropped)
        num_taken = self._ask(self._inner.try_consume_tokens, text[common:]) or 0
        self._path = tuple(text[: common + num_taken])
        if num_taken < len(text) - common and not self.error:
            raise ValueError(f"token {text[len(self._path)]} does not follow the grammar")

    def commit(self, tokens: Sequence[int]) -> None:
        self.seek(tokens)
        self._has_ended = self._ended
        self._path = ()
        self._allowance.add(len(tokens))

    def mask(self) -> bytes:
        mask = None
        if not self.error:
            if self._is_at_end():
                return self._only_ends
            mask = self._ask(self._inner.compute_bitmask)
        # llguidance's mask may be one word longer.
        return bytes(len(self._only_ends)) if mask is None else mask[: len(self._only_ends)]

    def forced(self, limit: int) -> tuple[int, ...]:
        self.seek(())
        if self.finished:
            return ()
        return tuple((self._ask(self._inner.compute_ff_tokens) or [])[:limit])

    @property
    def finished(self) -> bool:
        return bool(self.error) or self._is_at_end()

    def _is_at_end(self) -> bool:
        return self._ended or self._inner.is_stopped()

    def _before_end(self, path: Sequence[int]) -> list[int]:
        length = next((i for i, token in enumerate(path) if token in self._end_ids), len(path))
        return list(path[:length])

    def _ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """llguidance's answer; None if the grammar is given up, and `error` says why.

        It is given up at a limit from which llguidance does not recover, or when the row has no
        time left.
        """
        answer, cause = None, ""
        try:
            if not self._allowance.used_up:
                with self._allowance.spending():
                    answer = call(*args, **kwargs)
        except BaseException as failure:  # its panics are not Exceptions
            if isinstance(failure, KeyboardInterrupt):
                raise
            answer, cause = None, str(failure) or type(failure).__name__
        if self._inner.is_error():
            cause = self._inner.get_error()
        elif not cause and self._allowance.used_up:
            cause = "it takes too long to follow; use a simpler one"
        if not cause:
            return answer
        cause = cause.partition("\n")[0][:MAX_CAUSE_CHARS]
        self.error = f"the grammar could not be followed any further: {cause}"
        return None


def bitmask(ids: Collection[int], vocab_size: int) -> bytes:
    """Bit i % 8 of byte i // 8 for each id, in ceil(vocab_size / 32) words of 4 bytes."""
    bits = sum(1 << index for index in set(ids))
    return bits.to_bytes(-(-vocab_size // 32) * 4, "little")


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
