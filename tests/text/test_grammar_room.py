"""The memory of compiled grammars: what is kept gives way, what requests hold does not."""

from __future__ import annotations

import pytest

from lorastack.errors import ResourceExhaustedError
from lorastack.text import grammar as module
from lorastack.text.grammar import GrammarCompiler, Regex
from tests.text.test_grammar import tokenizer_of

ROOM = 100


def test_grammars_that_requests_hold_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", ROOM)
    tokenizer = tokenizer_of("bytes")
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    held = grammars.compile(Regex("a+"), num_bytes=70)
    grammars.compile(Regex("b+"), num_bytes=30)
    with pytest.raises(ResourceExhaustedError, match=r"response_format\.regex"):
        grammars.compile(Regex("c+"), num_bytes=40)
    assert grammars.kept(Regex("b+")) is None, "what is only kept gives way first"
    assert grammars.compile(Regex("c+"), num_bytes=30)
    del held
    assert grammars.compile(Regex("d+"), num_bytes=ROOM)


def test_what_is_kept_is_bounded_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", ROOM)
    tokenizer = tokenizer_of("bytes")
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    wanted = [Regex("a+"), Regex("b+"), Regex("c+")]
    for each in wanted:
        grammars.compile(each, num_bytes=40)
    assert [grammars.kept(each) is not None for each in wanted] == [False, True, True]
