"""Grammars that take long end their own row: by a clock that the tests set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorastack.text.allowance import MOST_SECONDS, SECONDS_PER_TOKEN, Allowance, Clock
from lorastack.text.grammar import GrammarCompiler, Regex
from lorastack.text.matcher import CompiledGrammar, RowMatcher
from tests.text.test_grammar import allowed, tokenizer_of


class Slow:
    """llguidance whose answers take as long as the test says."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.now = 0.0
        self.seconds = 0.0

    def clock(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        attribute: Callable[..., Any] = getattr(self._inner, name)
        if name not in ("try_consume_tokens", "compute_bitmask", "compute_ff_tokens", "rollback"):
            return attribute

        def call(*args: Any) -> Any:
            self.now += self.seconds
            return attribute(*args)

        return call


@pytest.fixture
def slow() -> Slow:
    grammar = GrammarCompiler(tokenizer_of("bytes"), 300).compile(Regex("a{200}"))
    assert isinstance(grammar, CompiledGrammar)
    return Slow(grammar._start.deep_copy())


@pytest.fixture
def matcher(slow: Slow) -> RowMatcher:
    ends = tokenizer_of("bytes").eos_ids
    only_ends = CompiledGrammar(slow._inner, ends, 300)._only_ends
    return RowMatcher(slow, ends, only_ends, Allowance(Clock(slow.clock)))  # type: ignore[arg-type]


A = tokenizer_of("bytes").encode_part("a")


@pytest.mark.parametrize("ask", ["mask", "forced", "commit"])
def test_one_answer_that_takes_too_long_ends_the_row(
    slow: Slow, matcher: RowMatcher, ask: str
) -> None:
    slow.seconds = MOST_SECONDS * 1.1
    args = {"mask": [], "forced": [3], "commit": [A]}[ask]
    getattr(matcher, ask)(*args)
    assert "too long" in matcher.error
    assert matcher.finished and allowed(matcher) == [] and matcher.forced(9) == ()
    spent = slow.now
    matcher.seek(A)
    matcher.commit(A)
    assert slow.now == spent, "whoever gave up takes no more time"


def test_many_slow_answers_end_the_row_and_as_many_quick_ones_do_not(
    slow: Slow, matcher: RowMatcher
) -> None:
    for seconds, ends in ((0.3 * SECONDS_PER_TOKEN, False), (2 * SECONDS_PER_TOKEN, True)):
        slow.seconds = seconds
        for _ in range(90):
            matcher.mask()
            matcher.commit(A)
        assert bool(matcher.error) == ends


def test_masks_of_a_tree_count_and_its_tokens_only_if_they_stay(
    slow: Slow, matcher: RowMatcher
) -> None:
    """However many nodes a step has, it takes no longer than a row may at once."""
    for _ in range(30):  # nothing is saved up beyond the limit
        matcher.commit(A)
    slow.seconds = 0.5 * SECONDS_PER_TOKEN
    began = slow.now
    for depth in range(150):
        matcher.seek(A * (depth % 8))
        matcher.mask()
    assert matcher.error
    assert slow.now - began < MOST_SECONDS + 2 * slow.seconds


def test_what_a_library_panics_with_is_the_row_s_error(matcher: RowMatcher) -> None:
    class Panic(BaseException):
        pass

    def panic() -> bytes:
        raise Panic

    matcher._inner.compute_bitmask = panic  # type: ignore[method-assign]
    assert allowed(matcher) == []
    assert "Panic" in matcher.error


def test_nobody_asks_again_what_took_one_row_too_long(slow: Slow) -> None:
    """Neither rows that run by then nor later ones: one grammar stops the thread once."""
    ends = tokenizer_of("bytes").eos_ids
    grammar = CompiledGrammar(slow, ends, 300, Clock(slow.clock))  # type: ignore[arg-type]
    slow.deep_copy = lambda: slow
    first, second = grammar.matcher(), grammar.matcher()
    second.mask()
    slow.seconds = MOST_SECONDS * 1.1
    first.mask()
    spent = slow.now
    for matcher in (first, second, grammar.matcher()):
        assert allowed(matcher) == []
        assert "too long" in matcher.error
    assert slow.now == spent
