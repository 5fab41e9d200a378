"""Structured output: a JSON schema or a regular expression, compiled over a model's tokens.

llguidance compiles and matches. It matches the bytes of the text as the client gets it; special
tokens have none and are never part of it.

JSON comes on one line, with ", " and ": " between its parts, as most models write it: much of it is
then forced, and drafted for free. A schema may ask for other spaces by `x-guidance`, llguidance's
own key.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn

from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason
from lorastack.request import Grammar
from lorastack.text.matcher import CompiledGrammar
from lorastack.text.tokenizer import Tokenizer
from lorastack.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_KEPT = 64  # compiled grammars
MAX_KEPT_CHARS = 1 << 20  # of their texts
MAX_MESSAGE_CHARS = 300
# How llguidance shows a mistake in an expression: a caret under its first character.
_MISTAKE = re.compile(r"regex parse error:\n    (.*)\n    (?P<before> *)\^.*\nerror: (?P<what>.*)")


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The text is JSON that follows this schema."""

    text: str
    field: ClassVar[str] = "response_format.json_schema"
    rule: ClassVar[str] = "a JSON schema that llguidance can compile"


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole text matches this expression: Rust's syntax, without look-around."""

    text: str
    field: ClassVar[str] = "response_format.regex"
    rule: ClassVar[str] = "a regular expression in Rust's syntax, without look-around"


class GrammarCompiler:
    """Compiles grammars for one model and keeps the last ones. For any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the model's outputs; those that the tokenizer lacks are never allowed."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = frozenset(index for index in tokenizer.eos_ids if index < vocab_size)
        self._building = threading.Lock()
        self._vocabulary: Vocabulary | None = None  # built when the first grammar is asked for
        self._keeping = threading.Lock()
        self._kept: OrderedDict[tuple[JsonSchema | Regex, int], Grammar] = OrderedDict()

    def compile(self, wanted: JsonSchema | Regex, num_dropped: int = 0) -> Grammar:
        """Blocks for milliseconds, a second at most.

        num_dropped: spaces that the text loses at its beginning (`Joiner.num_dropped` behind the
        prompt).

        Raises InvalidArgumentError for what is malformed (saying where), not supported, too complex
        or without any text that follows it; FailedPreconditionError if the model cannot end a text.
        """
        with self._keeping:
            if (grammar := self._kept.get((wanted, num_dropped))) is not None:
                self._kept.move_to_end((wanted, num_dropped))
                return grammar
        vocabulary = self._built()
        start = _start(vocabulary, wanted, num_dropped)
        grammar = CompiledGrammar(start, self._end_ids, self._vocab_size)
        with self._keeping:
            self._kept[wanted, num_dropped] = grammar
            num_chars = sum(len(kept.text) for kept, _ in self._kept)
            while len(self._kept) > MAX_KEPT or num_chars > MAX_KEPT_CHARS:
                (oldest, _), _ = self._kept.popitem(last=False)
                num_chars -= len(oldest.text)
        return grammar

    def _built(self) -> Vocabulary:
        if not self._end_ids:
            raise FailedPreconditionError(
                "response_format needs a model with an end token, and this one's files name none; "
                "leave response_format unset",
                reason=Reason.UNSUPPORTED_MODEL,
                field="response_format",
            )
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._end_ids, self._vocab_size)
            return self._vocabulary


def _start(vocabulary: Vocabulary, wanted: JsonSchema | Regex, num_dropped: int) -> LLMatcher:
    """llguidance before the first token. num_dropped: spaces that its text loses."""
    # Deferred, as in `Vocabulary`.
    from llguidance import LLMatcher

    if isinstance(wanted, JsonSchema):
        return _checked(vocabulary, wanted, _schema_grammar(wanted))
    if _ends_in_escape(wanted.text):
        _refuse(wanted, f"an escape without its character at character {len(wanted.text)}")
    start = _checked(vocabulary, wanted, LLMatcher.grammar_from_regex(wanted.text))
    if num_dropped and _may_begin_with_space(start, vocabulary):
        spaced = " " * num_dropped + f"(?:{wanted.text})"
        start = _checked(vocabulary, wanted, LLMatcher.grammar_from_regex(spaced))
    return start


def _schema_grammar(schema: JsonSchema) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(
            schema.text,
            defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
        )
    except ValueError as error:
        _refuse(schema, str(error))


def _checked(vocabulary: Vocabulary, wanted: JsonSchema | Regex, grammar: str) -> LLMatcher:
    """grammar: in llguidance's form. Raises InvalidArgumentError."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    start = LLMatcher(vocabulary.llguidance, grammar, log_level=0, limits=limits)
    if start.is_error():
        _refuse(wanted, _mistake(start.get_error(), wanted))
    # Not every contradiction is found before it is asked for a token.
    if not any(start.compute_bitmask()) or start.is_error():
        _refuse(wanted, "no text of this model's tokens follows it, or it is too complex")
    return start


def _refuse(wanted: JsonSchema | Regex, cause: str) -> NoReturn:
    raise InvalidArgumentError(
        f"{wanted.field} must be {wanted.rule}: {cause[:MAX_MESSAGE_CHARS]}",
        reason=Reason.INVALID_GRAMMAR,
        field=wanted.field,
    )


def _mistake(message: str, wanted: JsonSchema | Regex) -> str:
    """llguidance's message on one line."""
    if (found := _MISTAKE.search(message)) is None:
        return message.partition("\n")[0].rpartition("(in regex): ")[2]
    place = len(found["before"])
    if isinstance(wanted, JsonSchema):
        return f"{found['what']} at character {place + 1} of the pattern {found[1]}"
    return f"{found['what']} at character {_own_place(wanted.text, place) + 1}"


def _own_place(regex: str, place: int) -> int:
    """Where the expression has what stands at `place` once llguidance has rewritten it."""
    from llguidance import regex_to_lark

    return bisect_left(range(len(regex)), place, key=lambda end: len(regex_to_lark(regex[:end])))


def _ends_in_escape(regex: str) -> bool:
    """llguidance drops an escape at the end without a word."""
    return (len(regex) - len(regex.rstrip("\\"))) % 2 == 1


def _may_begin_with_space(start: LLMatcher, vocabulary: Vocabulary) -> bool:
    mask = start.compute_bitmask()
    return any(
        token.startswith(b" ") and mask[index // 8] >> index % 8 & 1
        for index, token in enumerate(vocabulary.tokens)
    )
