"""The state of one request while it waits and runs. Only the step thread touches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorastack.engine.batch import RowResult
from lorastack.engine.pages import root_hash
from lorastack.request import (
    Final,
    FinishReason,
    GeneratedToken,
    Matcher,
    PromptToken,
    Request,
    RowEvent,
    SpeculationStats,
    States,
    Timings,
    TokenLogprobs,
    TokenSource,
)
from lorastack.sampling.processors import Processor, needs_processor
from lorastack.speculation.lookup import NOWHERE, Continuation, Lookup
from lorastack.speculation.proposal import Proposal
from lorastack.text.stream import TextStream


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """tokens: prompt and output, the row's sequence. num_computed: how many have KV in `pages`.

    A row that does not decode still takes in its prompt or, after a preemption, prompt and output.
    """

    request: Request
    text: TextStream
    submitted: float  # time.monotonic() seconds, as all times here
    rope_length: int = 0  # see Runner.rope_length
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)  # of the published pages, in order
    proposal: Proposal | None = None
    lookup: Lookup = field(default_factory=Lookup)  # has read the first tokens, see `read`
    continuation: Continuation = NOWHERE  # what the lookup gave for this step
    parked: bool = False  # its reader is slow: keeps its pages, takes no step
    cancelled: bool = False
    num_listed: int = 0  # prompt tokens that an event has given, if their logprobs are wanted
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    adapter_wait_start: float | None = None
    adapter_wait: float = 0.0  # seconds, all waits together
    admitted: float | None = None
    first_token: float | None = None

    lora_digests: tuple[str, ...] = field(init=False)
    matcher: Matcher | None = field(init=False)  # where the row stands in its grammar
    processor: Processor | None = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.tokens = list(request.prompt_ids)
        self.lora_digests = tuple(use.digest for use in request.loras)
        self.matcher = request.grammar.matcher() if request.grammar else None
        self.processor = None
        if needs_processor(request.sampling, request.grammar):
            self.processor = Processor(request.sampling, request.prompt_ids, self.matcher)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens it may still generate."""
        return self.request.stop.max_new_tokens - self.num_generated

    @property
    def num_pending(self) -> int:
        """Tokens without KV."""
        return len(self.tokens) - self.num_computed

    @property
    def decodes(self) -> bool:
        """True if only its last token has no KV: its next step makes a token and may draft."""
        return self.num_pending == 1

    @property
    def lists_prompt(self) -> bool:
        """True if the prompt's log-probabilities are wanted and some were not given yet."""
        return self.request.num_prompt_logprobs is not None and self.num_listed < self.num_prompt

    @property
    def num_unscored(self) -> int:
        """Tokens, from the first without KV on, whose logits say nothing that is still wanted.

        Of a row that lists its prompt: the logits behind its last listed token are the next ones.
        """
        return max(self.num_listed - 1 - self.num_computed, 0)

    @property
    def cacheable(self) -> Sequence[int]:
        """Its tokens as far as the prefix cache may hold them, see `Pages.match`.

        The logits behind a cached token are gone; `match` leaves the last of these tokens out.
        """
        return self.tokens[: self.num_listed] if self.lists_prompt else self.tokens

    @property
    def kv_root(self) -> bytes:
        """The hash that the chain of its pages starts from, see `engine.pages`."""
        return root_hash(self.request.loras, self.rope_length)

    def uses(self, digest: str) -> bool:
        """True if `digest` is one of the row's LoRAs or its heads."""
        return digest in self.request.digests

    @property
    def wake_time(self) -> float | None:
        """When its deadline or its time limit ends it, whichever comes first."""
        limits = []
        if self.request.deadline is not None:
            limits.append(self.request.deadline)
        if self.request.stop.time_limit is not None:
            limits.append(self.submitted + self.request.stop.time_limit)
        return min(limits, default=None)

    def admit(self, pages: list[int], hashes: list[bytes], num_cached: int, now: float) -> None:
        """Start, or start again, on `pages`, which hold KV of the first `num_cached` tokens."""
        self.pages, self.page_hashes, self.num_computed = pages, hashes, num_cached
        if self.admitted is None:
            self.admitted, self.num_cached = now, num_cached

    def preempt(self) -> None:
        """Give everything up but the tokens."""
        self.pages, self.page_hashes, self.num_computed = [], [], 0
        self.proposal = None

    def look_up(self, limit: int) -> Continuation:
        """At most `limit` tokens that followed the row's last ones earlier."""
        self.read(len(self.tokens))
        return self.lookup.find(limit)

    def read(self, count: int) -> None:
        """Give the lookup the row's first `count` tokens."""
        for token in self.tokens[self.lookup.num_tokens : count]:
            self.lookup.push(token)

    def wait_for_adapters(self, now: float) -> None:
        """Begin to count `adapter_wait`, if it is not counted already."""
        if self.adapter_wait_start is None:
            self.adapter_wait_start = now

    def got_adapters(self, now: float) -> None:
        """End what `wait_for_adapters` began."""
        if self.adapter_wait_start is not None:
            self.adapter_wait += now - self.adapter_wait_start
            self.adapter_wait_start = None

    def scored(self, num_tokens: int) -> range:
        """Of a chunk of so many tokens, those whose logits score a prompt token not listed yet."""
        if not self.lists_prompt:
            return range(0)
        return range(self.num_unscored, min(num_tokens, self.num_prompt - 1 - self.num_computed))

    def list_prompt(self, logprobs: Sequence[TokenLogprobs]) -> tuple[PromptToken, ...]:
        """The next tokens of the prompt, with these; before them the first, which has none."""
        if not self.lists_prompt:
            return ()
        found: list[TokenLogprobs | None] = [] if self.num_listed else [None]
        found.extend(logprobs)
        ids = self.request.prompt_ids[self.num_listed : self.num_listed + len(found)]
        self.num_listed += len(found)
        return tuple(
            PromptToken(id=token, logprobs=each) for token, each in zip(ids, found, strict=True)
        )

    def append(self, result: RowResult, eos_ids: frozenset[int], now: float) -> RowEvent:
        """Take a step's tokens, up to the first that ends the row: then the event is its last."""
        if self.first_token is None:
            self.first_token = now
        stop = self.request.stop
        emitted: list[GeneratedToken] = []
        text: list[str] = []
        finish: FinishReason | None = None
        for index, token in enumerate(result.tokens):
            source = result.sources[index] if index < len(result.sources) else TokenSource.MODEL
            logprobs = result.logprobs[index] if result.logprobs else None
            self.tokens.append(token)
            emitted.append(GeneratedToken(id=token, source=source, logprobs=logprobs))
            if token in stop.stop_token_ids:
                finish = FinishReason.STOP_TOKEN
            elif token in eos_ids and not stop.ignore_eos:
                finish = FinishReason.EOS
            else:
                text.append(self.text.push(token))
                if self.text.match is not None:
                    finish = FinishReason.STOP_SEQUENCE
                elif self.num_left == 0:
                    finish = FinishReason.LENGTH
            if finish is not None:
                break
        self._count_accepted(result.sources[: len(emitted)])
        states = None if result.states is None else result.states[: len(emitted)]
        if finish is None:
            if self.processor is not None:
                self.processor.commit(result.tokens)
            return RowEvent(
                request_id=self.request.request_id,
                text="".join(text),
                tokens=tuple(emitted),
                states=states,
            )
        return self.finish(finish, now, "".join(text), tuple(emitted), states)

    def finish(
        self,
        reason: FinishReason,
        now: float,
        text: str = "",
        tokens: tuple[GeneratedToken, ...] = (),
        states: States | None = None,
    ) -> RowEvent:
        """The row's last event, with the text that was held back for a stop sequence."""
        if reason is not FinishReason.STOP_SEQUENCE:
            text += self.text.flush()
            if self.text.match is not None:
                reason = FinishReason.STOP_SEQUENCE
        self.got_adapters(now)
        admitted = now if self.admitted is None else self.admitted
        first_token = now if self.first_token is None else self.first_token
        return RowEvent(
            request_id=self.request.request_id,
            text=text,
            tokens=tokens,
            states=states,
            final=Final(
                finish_reason=reason,
                stop_match=self.text.match or "",
                prompt_tokens=self.num_prompt,
                cached_prompt_tokens=self.num_cached,
                generated_tokens=self.num_generated,
                speculation=self.stats,
                timings=Timings(
                    queue=admitted - self.submitted,
                    adapter_wait=self.adapter_wait,
                    time_to_first_token=first_token - self.submitted,
                    total=now - self.submitted,
                ),
            ),
        )

    def count_step(self, drafted: Sequence[TokenSource]) -> None:
        """Count a decode step. drafted: the sources of its tree's nodes, the root left out.

        The step that makes the first token is no decode step, although it may draft as well.
        """
        self.stats.steps += self.num_generated > 0
        self.stats.drafted.update(drafted)

    def _count_accepted(self, sources: Sequence[TokenSource]) -> None:
        self.stats.accepted.update(sources)
        by_head = self.stats.accepted_by_head
        for head, source in enumerate(sources):
            if source is TokenSource.HEADS:
                by_head.extend([0] * (head + 1 - len(by_head)))
                by_head[head] += 1
