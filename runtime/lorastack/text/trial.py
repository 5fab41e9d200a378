"""Tries a grammar out where it can do no harm: compiles it, then follows it for some tokens.

Runs in a worker process, which ends what takes too much time, memory or stack. A grammar that
passes is compiled in the server.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorastack.errors import InvalidArgumentError
from lorastack.text.grammar import JsonSchema, Regex, compile_start, refusal, refuse
from lorastack.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

T = TypeVar("T")

MAX_SECONDS = 0.05  # of processor time, for a mask or another answer that a step needs
WALK_SECONDS = 0.2  # of processor time for all walks
NUM_STEPS = 40  # of each walk
NUM_PICKS = 16  # random tokens that a step tries
# What ends or separates the parts of most texts; the rest of them is mostly letters.
STRUCTURE = b'",:{}[]0123456789.- \n'


def trial_body(wanted: JsonSchema | Regex) -> bytes:
    """A trial's job, as `run` reads it."""
    return wanted.field.encode() + b"\n" + wanted.text.encode()


def run(body: bytes, vocabulary: Vocabulary) -> tuple[int, str]:
    """Runs a trial's job. Returns the bytes that the grammar takes, and why it is refused or ""."""
    wanted = _wanted_of(body)
    try:
        return try_out(vocabulary, wanted), ""
    except InvalidArgumentError as error:
        return 0, error.message.removeprefix(refusal(wanted, ""))


def _wanted_of(body: bytes) -> JsonSchema | Regex:
    field, _, text = body.decode().partition("\n")
    return JsonSchema(text) if field == JsonSchema.field else Regex(text)


def vocabulary_of(setup: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that a `GrammarCompiler.trial_setup` describes."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(setup["tokenizer"])

    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    tokens = [token.encode("latin-1") for token in setup["tokens"]]
    return Vocabulary(tokens, setup["end_ids"], encode, setup["num_dropped"])


def try_out(vocabulary: Vocabulary, wanted: JsonSchema | Regex) -> int:
    """Returns the bytes that the grammar takes. Raises InvalidArgumentError if it is refused."""
    before = _resident()
    clock = _Clock(wanted)
    start = compile_start(vocabulary, wanted, vocabulary.num_dropped, clock.mask)
    began = time.process_time()
    for pick in (_any_of, _short_of, _long_of):
        walk = _Walk(vocabulary, start.deep_copy(), pick, clock)
        for _ in range(NUM_STEPS):
            if time.process_time() - began > WALK_SECONDS or not walk.step():
                break
        if walk.error:
            refuse(wanted, f"it is too complex: {walk.error}")
        del walk
    num_bytes = max(_resident() - before, 0)
    del start  # freeing it needs as much stack as its nesting
    return num_bytes


Pick = Callable[[Sequence[int], Vocabulary], int]


def _any_of(ids: Sequence[int], vocabulary: Vocabulary) -> int:
    return ids[0]


def _short_of(ids: Sequence[int], vocabulary: Vocabulary) -> int:
    """A short token, which ends the current part of the text if any can."""
    return min(
        ids, key=lambda i: (vocabulary.tokens[i][:1] not in STRUCTURE, len(vocabulary.tokens[i]))
    )


def _long_of(ids: Sequence[int], vocabulary: Vocabulary) -> int:
    return max(ids, key=lambda i: len(vocabulary.tokens[i]))


class _Clock:
    """Refuses a grammar whose answers take too long: the step that waits delays all rows."""

    def __init__(self, wanted: JsonSchema | Regex) -> None:
        self._wanted = wanted

    def mask(self, matcher: LLMatcher) -> bytes:
        return self.timed(matcher.compute_bitmask)

    def timed(self, call: Callable[[], T]) -> T:
        began = time.process_time()
        result = call()
        if (took := time.process_time() - began) > MAX_SECONDS:
            refuse(
                self._wanted,
                f"its masks take too long: {took * 1000:.0f} ms for one token, at most "
                f"{MAX_SECONDS * 1000:.0f}",
            )
        return result


class _Walk:
    """One text that follows the grammar, token by token."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, pick: Pick, clock: _Clock
    ) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._pick = pick
        self._clock = clock
        self._chance = random.Random(0)
        # One token of each structural beginning: a mask of many is mostly letters.
        firsts = {token[:1]: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}
        self._structure = [i for first, i in firsts.items() if first in STRUCTURE]

    @property
    def error(self) -> str:
        return self._matcher.get_error().partition("\n")[0] if self._matcher.is_error() else ""

    def step(self) -> bool:
        """Takes the forced tokens and one more. False at the end of the text."""
        matcher, timed = self._matcher, self._clock.timed
        if forced := timed(matcher.compute_ff_tokens):
            timed(lambda: matcher.consume_tokens(forced))
        if matcher.is_stopped():
            return False
        choices = self._allowed(self._clock.mask(matcher))
        if not choices:
            return False
        token = self._pick(choices, self._vocabulary)
        timed(lambda: matcher.consume_token(token))
        return not matcher.is_stopped()

    def _allowed(self, mask: bytes) -> list[int]:
        """Some of the tokens of a mask, end tokens aside."""
        tokens, chance = self._vocabulary.tokens, self._chance

        def fits(index: int) -> bool:
            return bool(mask[index // 8] >> index % 8 & 1 and tokens[index])

        tried = [chance.randrange(len(tokens)) for _ in range(NUM_PICKS)]
        allowed = [index for index in (*tried, *self._structure) if fits(index)]
        if allowed:
            return allowed
        place = next((i for i, byte in enumerate(mask) if byte), 0) * 8
        return [i for i in range(place, min(place + 8, len(tokens))) if fits(i)]


def _resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
