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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn
from weakref import WeakKeyDictionary

from lorastack.config import GIB, MIB
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.request import Grammar
from lorastack.text.matcher import CompiledGrammar
from lorastack.text.tokenizer import Tokenizer
from lorastack.text.vocabulary import Vocabulary, token_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_KEPT = 64  # compiled grammars
MAX_KEPT_CHARS = 1 << 20  # characters of their texts
MAX_KEPT_BYTES = 256 * MIB  # memory that they take
MAX_BYTES = GIB  # memory of all grammars, kept ones and those of requests
# What a mask may cost once a row is under way: a tenth of a second at worst. Objects of 200
# optional properties, enumerations of 1,000 and words in any script need less than half.
INITIAL_FUEL = 200_000
STEP_FUEL = 20_000
MAX_STEP_ITEMS = 10_000
MAX_LEXER_STATES = 20_000
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
    """Compiles grammars for one model and keeps the last ones. Thread-safe.

    What callers write is compiled here only after a trial (`text.trial`) in another process.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the model's outputs; those without a token are never allowed."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = frozenset(index for index in tokenizer.eos_ids if index < vocab_size)
        self._building = threading.Lock()
        self._vocabulary: Vocabulary | None = None  # built when the first grammar is asked for
        self._keeping = threading.Lock()
        self._kept: OrderedDict[tuple[JsonSchema | Regex, int], CompiledGrammar] = OrderedDict()
        # Bytes of every grammar that a request or `_kept` still holds.
        self._sizes: WeakKeyDictionary[CompiledGrammar, int] = WeakKeyDictionary()

    def kept(self, wanted: JsonSchema | Regex, num_dropped: int = 0) -> Grammar | None:
        """The grammar if it is still kept, else None. num_dropped: see `compile`."""
        with self._keeping:
            if (grammar := self._kept.get((wanted, num_dropped))) is not None:
                self._kept.move_to_end((wanted, num_dropped))
            return grammar

    def kept_bytes(self, wanted: JsonSchema | Regex) -> int | None:
        """The grammar's memory, as its trial measured it, if it is still kept, else None."""
        with self._keeping:
            if (grammar := self._kept.get((wanted, 0))) is None:
                return None
            self._kept.move_to_end((wanted, 0))
            return self._sizes[grammar]

    def check_model(self) -> None:
        """Raises FailedPreconditionError if the model cannot end a text."""
        if not self._end_ids:
            raise FailedPreconditionError(
                "response_format needs a model with an end token, and this one's files name none; "
                "leave response_format unset",
                reason=Reason.UNSUPPORTED_MODEL,
                field="response_format",
            )

    def compile(
        self, wanted: JsonSchema | Regex, num_dropped: int = 0, num_bytes: int = 0
    ) -> Grammar:
        """The grammar, kept or compiled. num_dropped: spaces that the text loses at its beginning
        (`Joiner.num_dropped` behind the prompt); num_bytes: its memory, as its trial measured it.

        Raises InvalidArgumentError if it is malformed (saying where), not supported, too complex,
        or no text follows it; ResourceExhaustedError while grammars of requests leave no room;
        FailedPreconditionError as `check_model`.
        """
        if (kept := self.kept(wanted, num_dropped)) is not None:
            return kept
        self._check_room(wanted, num_bytes)
        start = compile_start(self._built(), wanted, num_dropped)
        grammar = CompiledGrammar(start, self._end_ids, self._vocab_size)
        with self._keeping:
            self._kept[wanted, num_dropped] = grammar
            self._sizes[grammar] = num_bytes
            while self._too_many():
                self._kept.popitem(last=False)
        return grammar

    def trial_setup(self) -> dict[str, object]:
        """What `trial.vocabulary_of` rebuilds our vocabulary from in another process, as JSON."""
        tokens = token_bytes(self._tokenizer, self._end_ids, self._vocab_size)
        return {
            "tokens": [token.decode("latin-1") for token in tokens],
            "end_ids": sorted(self._end_ids),
            "tokenizer": self._tokenizer.to_json(),
            "num_dropped": self._tokenizer.joiner().num_dropped,
        }

    def _check_room(self, wanted: JsonSchema | Regex, num_bytes: int) -> None:
        with self._keeping:
            while self._kept and sum(self._sizes.values()) + num_bytes > MAX_BYTES:
                self._kept.popitem(last=False)
            if sum(self._sizes.values()) + num_bytes > MAX_BYTES:
                raise ResourceExhaustedError(
                    f"{wanted.field} needs {num_bytes >> 20} MiB, and the grammars of running "
                    "requests leave no room for it; try again later, or with a simpler one",
                    field=wanted.field,
                )

    def _too_many(self) -> bool:
        """True if the kept grammars exceed a limit: their number, characters or bytes."""
        num_chars = sum(len(wanted.text) for wanted, _ in self._kept)
        num_bytes = sum(self._sizes[grammar] for grammar in self._kept.values())
        too_large = num_chars > MAX_KEPT_CHARS or num_bytes > MAX_KEPT_BYTES
        return len(self._kept) > MAX_KEPT or too_large

    def _built(self) -> Vocabulary:
        self.check_model()
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(
                    token_bytes(self._tokenizer, self._end_ids, self._vocab_size),
                    self._end_ids,
                    self._tokenizer.encode_part,
                    self._tokenizer.joiner().num_dropped,
                )
            return self._vocabulary


def compile_start(
    vocabulary: Vocabulary,
    wanted: JsonSchema | Regex,
    num_dropped: int = 0,
    take_mask: Callable[[LLMatcher], bytes] | None = None,
) -> LLMatcher:
    """llguidance's matcher before the first token. num_dropped: spaces that its text loses.
    take_mask: computes its first mask, which is a check too. Raises InvalidArgumentError."""
    # Deferred, as in `Vocabulary`.
    from llguidance import LLMatcher

    take_mask = take_mask or LLMatcher.compute_bitmask
    if isinstance(wanted, JsonSchema):
        return _checked(vocabulary, wanted, _schema_grammar(wanted), take_mask)
    if _ends_in_escape(wanted.text):
        refuse(wanted, f"an escape without its character at character {len(wanted.text)}")
    grammar = LLMatcher.grammar_from_regex(wanted.text)
    start = _checked(vocabulary, wanted, grammar, take_mask)
    if num_dropped and _may_begin_with_space(start, vocabulary):
        spaced = " " * num_dropped + f"(?:{wanted.text})"
        grammar = LLMatcher.grammar_from_regex(spaced)
        start = _checked(vocabulary, wanted, grammar, take_mask)
    return start


def _schema_grammar(schema: JsonSchema) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(
            schema.text,
            defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
        )
    except ValueError as error:
        refuse(schema, str(error))


def _checked(
    vocabulary: Vocabulary,
    wanted: JsonSchema | Regex,
    grammar: str,
    take_mask: Callable[[LLMatcher], bytes],
) -> LLMatcher:
    """A matcher whose first mask allows something. Raises InvalidArgumentError if none does.

    grammar: in llguidance's form.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=INITIAL_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=MAX_STEP_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )
    start = LLMatcher(vocabulary.llguidance, grammar, log_level=0, limits=limits)
    if start.is_error():
        refuse(wanted, _mistake(start.get_error(), wanted))
    # Some contradictions show only when a token is asked for.
    if not any(take_mask(start)) or start.is_error():
        refuse(wanted, "no text of this model's tokens follows it, or it is too complex")
    return start


def refusal(wanted: JsonSchema | Regex, cause: str) -> str:
    """The message for the caller."""
    return f"{wanted.field} must be {wanted.rule}: {cause}"


def refuse(wanted: JsonSchema | Regex, cause: str) -> NoReturn:
    """Raises InvalidArgumentError for `wanted`, with its cause."""
    raise InvalidArgumentError(
        refusal(wanted, cause[:MAX_MESSAGE_CHARS]),
        reason=Reason.INVALID_GRAMMAR,
        field=wanted.field,
    )


def _mistake(message: str, wanted: JsonSchema | Regex) -> str:
    """llguidance's message on one line."""
    if (match := _MISTAKE.search(message)) is None:
        return message.partition("\n")[0].rpartition("(in regex): ")[2]
    place = len(match["before"])
    if isinstance(wanted, JsonSchema):
        return f"{match['what']} at character {place + 1} of the pattern {match[1]}"
    return f"{match['what']} at character {_own_place(wanted.text, place) + 1}"


def _own_place(regex: str, place: int) -> int:
    """The place in `regex` that stands at `place` in llguidance's rewriting of it."""
    from llguidance import regex_to_lark

    return bisect_left(range(len(regex)), place, key=lambda end: len(regex_to_lark(regex[:end])))


def _ends_in_escape(regex: str) -> bool:
    """True if an escape at the end lacks its character, which llguidance drops silently."""
    return (len(regex) - len(regex.rstrip("\\"))) % 2 == 1


def _may_begin_with_space(start: LLMatcher, vocabulary: Vocabulary) -> bool:
    mask = start.compute_bitmask()
    return any(
        token.startswith(b" ") and mask[index // 8] >> index % 8 & 1
        for index, token in enumerate(vocabulary.tokens)
    )
