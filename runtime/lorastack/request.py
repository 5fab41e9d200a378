"""What crosses between the service and the engine: requests one way, events the other.

The service fills Request (ids already resolved to digests, text already tokenised); the engine's
step thread fills every event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from lorastack.errors import LorastackError

MAX_LORAS = 16  # in a stack
MAX_LORA_SCALE = 1e6  # either way; adapters' alpha is bounded likewise when they are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUse:
    """One entry of a row's stack. `Request.loras` is sorted by digest."""

    lora_id: str
    digest: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsUse:
    """The Medusa heads of a row.

    digest: what all that is learnt and counted about them goes by. A private part corrects other
    heads, the shared ones, which the row uses as well; whole heads have none. prior: what adaptive
    trees start from if nothing was learnt yet, a calibration's JSON; "" for the default.
    """

    medusa_id: str
    digest: str
    shared_id: str = ""
    shared_digest: str = ""
    prior: str = field(default="", repr=False)

    @property
    def digests(self) -> tuple[str, ...]:
        """Of all that must be on the device: the heads; or the shared ones, then the part."""
        return (self.shared_digest, self.digest) if self.shared_digest else (self.digest,)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is sampled. temperature 0: argmax, ties to the lowest id."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over the output alone, times the number of uses
    presence_penalty: float = 0.0  # over the output alone
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what its logit gains), ids distinct
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """True if the best token is taken and nothing is drawn."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopParams:
    """When a row ends. max_new_tokens is resolved by the service, never open."""

    max_new_tokens: int
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    time_limit: float | None = None  # seconds from submission


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalAcceptance:
    """Medusa's rule of acceptance (`speculation.accept`). NOT lossless: it changes tokens."""

    epsilon: float = 0.09
    delta: float = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationParams:
    """enabled False: no drafts. max_nodes None: the engine's own limit. typical None: exact."""

    enabled: bool = True
    max_nodes: int | None = None
    typical: TypicalAcceptance | None = None


class Matcher(Protocol):
    """Where one row stands in its grammar. Not thread-safe.

    It stands behind the committed tokens and the path that was last sought. Whatever `mask` allows
    may be sought or committed; end tokens are allowed for ever once one was taken.
    """

    error: str  # why the grammar was given up, after which nothing is allowed; else ""

    def seek(self, path: Sequence[int]) -> None:
        """Go to `path` behind the committed tokens, from any other path."""
        ...

    def commit(self, tokens: Sequence[int]) -> None:
        """Add these tokens to the committed ones, and stand behind them."""
        ...

    def mask(self) -> bytes:
        """The tokens that may come next, bit i % 8 of byte i // 8 for token i; none after `error`.

        ceil(V / 32) words of 4 bytes. The end tokens are among them where the text may end.
        """
        ...

    def forced(self, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that the committed ones leave no choice but to follow."""
        ...

    @property
    def finished(self) -> bool:
        """True if nothing but end tokens may follow."""
        ...


class Grammar(Protocol):
    """What a row's text must look like. Any thread may use it."""

    def matcher(self) -> Matcher:
        """A fresh one, at the beginning of the output."""
        ...


class States(Protocol):
    """The model's states after the final norm, one a token: a tensor [tokens, H] on the host, in
    the model's dtype.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, tokens: slice, /) -> States: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row to generate."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopParams
    speculation: SpeculationParams = SpeculationParams()
    loras: tuple[LoraUse, ...] = ()  # sorted by digest
    heads: HeadsUse | None = None
    num_logprobs: int | None = None  # n: the sampled token's and the n best; None: no logprobs
    num_prompt_logprobs: int | None = None  # the same of each token of the prompt
    capture_states: bool = False  # the states that predict its tokens come with them
    deadline: float | None = None  # time.monotonic() seconds
    grammar: Grammar | None = None  # None: any text

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its LoRAs and heads, all adapters that it uses."""
        loras = tuple(use.digest for use in self.loras)
        return loras if self.heads is None else (*loras, *self.heads.digests)

    @property
    def typical(self) -> TypicalAcceptance | None:
        """The typical acceptance that it asks for; None: exact, as always at temperature 0."""
        return None if self.sampling.greedy else self.speculation.typical


class TokenSource(StrEnum):
    """Who proposed a token: its node's source in the tree, or the model alone."""

    MODEL = "model"
    HEADS = "heads"
    PROMPT_LOOKUP = "prompt_lookup"
    GRAMMAR = "grammar"


class FinishReason(StrEnum):
    """Why a row ended with tokens."""

    LENGTH = "length"
    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"
    STOP_TOKEN = "stop_token"
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of the model's own distribution, before temperature and filters."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One token of the output."""

    id: int
    source: TokenSource
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToken:
    """One token of the prompt. logprobs: behind the tokens before it; None: it is the first."""

    id: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True, kw_only=True)
class SpeculationStats:
    """Counts over a row's decode steps (the step that finishes the prompt is not one).

    drafted, accepted: tokens by source. accepted_by_head: those of each head, from head 0 on.
    """

    steps: int = 0
    drafted: Counter[TokenSource] = field(default_factory=Counter)
    accepted: Counter[TokenSource] = field(default_factory=Counter)
    accepted_by_head: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds since submission; adapter_wait: of all waits for adapters together."""

    queue: float
    adapter_wait: float
    time_to_first_token: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """How a row ended, without its text and tokens."""

    finish_reason: FinishReason
    stop_match: str
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    speculation: SpeculationStats
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEvent:
    """What one step gave one row. Exactly one event of a row has `final` or `error`: its last."""

    request_id: str
    text: str = ""  # newly settled text: whole characters, no part of a stop sequence
    tokens: tuple[GeneratedToken, ...] = ()
    prompt_tokens: tuple[PromptToken, ...] = ()  # all of them before the first of `tokens`
    states: States | None = None  # those that predicted `tokens`, if the request captures them
    final: Final | None = None
    error: LorastackError | None = None

    @property
    def last(self) -> bool:
        """True if no event of the row follows."""
        return self.final is not None or self.error is not None
