"""The engine step by step, by a script: drafts, clock and missing adapters come from a seed.

Everything that makes tokens is real: scheduler, pages, runner, decoder, sampling, speculation. Only
what a machine or trained heads would decide is made up: how long steps take, what heads propose,
which adapters are not there yet.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.pool import DevicePool
from lorastack.config import EngineConfig
from lorastack.engine.batch import Batch, RowStep
from lorastack.engine.costs import Costs
from lorastack.engine.engine import Engine
from lorastack.engine.pages import Pages
from lorastack.engine.proposer import Proposer
from lorastack.engine.runner import Runner, StepResults
from lorastack.errors import LorastackError
from lorastack.layout import AdapterLayout
from lorastack.model.backends.base import Backend
from lorastack.model.kv import KVCache
from lorastack.request import Final, GeneratedToken, PromptToken, Request, RowEvent
from lorastack.speculation.cost import CostCurve
from lorastack.speculation.proposal import Proposal
from lorastack.text.tokenizer import Tokenizer

TIMED = ("engine", "loop", "scheduler", "runner")  # modules of the engine that read the clock
MAX_STEPS = 20_000


@dataclass(slots=True)
class Output:
    """What a request came to."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    prompt_tokens: list[PromptToken] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    text: str = ""
    final: Final | None = None
    error: LorastackError | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def ended(self) -> bool:
        return self.final is not None or self.error is not None

    def add(self, event: RowEvent) -> None:
        assert not self.ended, "an event after the last"
        assert not (event.prompt_tokens and self.tokens), "the prompt comes first"
        self.prompt_tokens += event.prompt_tokens
        self.tokens += event.tokens
        if event.states is not None:
            assert isinstance(event.states, torch.Tensor)
            assert len(event.states) == len(event.tokens)
            self.states.append(event.states)
        self.text += event.text
        self.final, self.error = event.final, event.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How a run goes. answers: by request id, the tokens that its heads guess at.

    step_seconds, token_seconds, heads_seconds: what a step, each of its tokens and each draft take.
    missing: how often adapters are not there. parking, cancelling: how often a row's reader stalls
    (or goes on), or leaves. arriving: how many requests come with each step.
    """

    num_pages: int
    page_size: int = 16
    max_rows: int = 32
    max_step_tokens: int = 256
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    step_seconds: float = 1.0
    token_seconds: float = 0.0
    heads_seconds: float = 0.0
    missing: float = 0.0
    parking: float = 0.0
    cancelling: float = 0.0
    arriving: int = 32


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class ScriptedRunner(Runner):
    """Its steps take what the script says, its drafts are the scripted ones."""

    def __init__(
        self, decoder: Backend, kv: KVCache, script: Script, chance: random.Random, clock: Clock
    ) -> None:
        super().__init__(decoder, kv)
        self._proposer = cast(Proposer, ScriptedProposer(decoder, script, chance, clock))
        self._script = script
        self._clock = clock

    def run(self, batch: Batch, meanwhile: Callable[[], None] | None = None) -> StepResults:
        tokens = sum(len(step.token_ids) for step in batch.steps)
        self._clock.now += self._script.step_seconds + tokens * self._script.token_seconds
        return super().run(batch, meanwhile)


class ScriptedProposer:
    """Heads that are right about half the time, all or some or none of them; some drafts fail."""

    def __init__(
        self, decoder: Backend, script: Script, chance: random.Random, clock: Clock
    ) -> None:
        self._vocab_size = decoder.shapes.vocab_size
        self._script = script
        self._chance = chance
        self._clock = clock

    def ask(self, step: RowStep) -> None:
        """No weights, nothing to ask the backend."""

    def propose(
        self,
        steps: Sequence[RowStep],
        last: Sequence[int],
        hidden_XH: torch.Tensor,
        drafted: Sequence[None],
    ) -> tuple[list[Proposal | None], list[str]]:
        """See `Proposer.propose`."""
        failed: list[str] = []
        if not any(step.num_candidates for step in steps):
            return [None] * len(steps), failed
        places = guessed_places(steps, last)
        proposals = [
            self._propose(step, place, failed) for step, place in zip(steps, places, strict=True)
        ]
        return proposals, failed

    def _propose(self, step: RowStep, index: int, failed: list[str]) -> Proposal | None:
        """The heads' proposal for the row's tokens from the generated one `index` on."""
        if not step.num_candidates:
            return None
        self._clock.now += self._script.heads_seconds
        heads = step.adapters.heads
        assert heads is not None
        if self._chance.random() < 0.03:
            failed.append(heads.digest)
            return None
        answer = self._script.answers.get(step.request.request_id, ())
        following = [*answer[index : index + heads.num_heads]]
        following += [0] * (heads.num_heads - len(following))
        skill = self._chance.choice((0.2, 0.6, 1.0))
        ids = [self._candidates(token, step.num_candidates, skill) for token in following]
        logprobs = [self._logprobs(step.num_candidates) for _ in following]
        return Proposal(tuple(ids), tuple(logprobs))

    def _candidates(self, right: int, count: int, skill: float) -> tuple[int, ...]:
        ids = self._chance.sample(range(self._vocab_size), count)
        if right not in ids and self._chance.random() < skill:
            ids[self._chance.choice((0, 0, 0, count - 1))] = right
        return tuple(ids)

    def _logprobs(self, count: int) -> tuple[float, ...]:
        chances, left = [], 1.0
        for _ in range(count):
            chances.append(left * self._chance.uniform(0.3, 0.9))
            left -= chances[-1]
        return tuple(sorted(map(math.log, chances), reverse=True))


def guessed_places(steps: Sequence[RowStep], last: Sequence[int]) -> list[int]:
    """For each row of a `Proposer.propose`, which token of its output the first head guesses."""
    places = []
    first = 0  # of the row's nodes in the step's states
    for step, node in zip(steps, last, strict=True):
        depth = len(step.tree.path_to(node - first)) if step.tree else 0
        first += step.tree.num_nodes if step.tree else 1
        places.append(step.num_generated + depth + 1)
    return places


def scripted_heads(digest: str, num_heads: int) -> DeviceAdapter:
    """Heads for a `ScriptedProposer`, which reads no weights."""
    layout = AdapterLayout(slots={}, scales={}, num_elements=0, itemsize=8, num_heads=num_heads)
    return DeviceAdapter(digest=digest, buffer=torch.empty(0), layout=layout)


class FlakyPool:
    """Adapters that are all loaded, but not there every so often. Counts pins."""

    blocked = True  # the loop never sleeps

    def __init__(
        self, adapters: Mapping[str, DeviceAdapter], missing: float, chance: random.Random
    ) -> None:
        self.pins: Counter[str] = Counter()
        self._adapters = adapters
        self._missing = missing
        self._chance = chance

    def poll(self) -> bool:
        return False

    def acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        if digests and self._chance.random() < self._missing:
            return None
        self.pins.update(digests)
        return tuple(self._adapters[digest] for digest in digests)

    def try_acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        return self.acquire(digests)

    def prefetch(self, digests: Collection[str], *, together: bool = False) -> None:
        assert self._adapters.keys() >= set(digests)

    def holds(self, digests: Collection[str]) -> bool:
        return self._adapters.keys() >= set(digests)

    def release(self, digests: Sequence[str]) -> None:
        self.pins.subtract(digests)


@dataclass(frozen=True, slots=True)
class Bench:
    """What runs share: a model on plain torch, its tokenizer, adapters by digest."""

    decoder: Backend
    tokenizer: Tokenizer
    adapters: Mapping[str, DeviceAdapter]

    def run(
        self, requests: Sequence[Request], script: Script, chance: random.Random
    ) -> dict[str, Output]:
        """All requests to their ends, by id. Nothing may be held then."""
        outputs = {request.request_id: Output() for request in requests}
        clock = Clock()
        pages = Pages(script.num_pages, script.page_size)
        pool = FlakyPool(self.adapters, script.missing, chance)
        with pytest.MonkeyPatch.context() as patch:
            for module in TIMED:
                patch.setattr(f"lorastack.engine.{module}.time", clock)
            engine = self._engine(script, chance, clock, pages, pool, outputs)
            self._step(engine, requests, script, chance, outputs)
        assert engine.num_rows == 0 and pages.num_held == 0 and not +pool.pins
        return outputs

    def _engine(
        self,
        script: Script,
        chance: random.Random,
        clock: Clock,
        pages: Pages,
        pool: FlakyPool,
        outputs: Mapping[str, Output],
    ) -> Engine:
        decoder = self.decoder
        kv = decoder.make_kv(script.num_pages, script.page_size)
        kv.data.fill_(torch.nan)  # what nobody wrote must not matter

        def on_events(events: list[RowEvent]) -> None:
            for event in events:
                outputs[event.request_id].add(event)

        def on_failure(error: BaseException) -> None:
            raise error

        step = [(n, script.step_seconds + n * script.token_seconds) for n in (1, 64)]
        return Engine(
            config=EngineConfig(
                max_rows=script.max_rows,
                max_queue=len(outputs),
                max_step_tokens=script.max_step_tokens,
            ),
            runner=ScriptedRunner(decoder, kv, script, chance, clock),
            tokenizer=self.tokenizer,
            pages=pages,
            pool=cast(DevicePool, pool),
            costs=Costs(CostCurve(step)),
            calibrations={},
            max_context=script.num_pages * script.page_size,
            vocab_size=decoder.shapes.vocab_size,
            on_events=on_events,
            on_failure=on_failure,
        )

    @staticmethod
    def _step(
        engine: Engine,
        requests: Sequence[Request],
        script: Script,
        chance: random.Random,
        outputs: Mapping[str, Output],
    ) -> None:
        coming, parked = list(requests), set[str]()
        for _ in range(MAX_STEPS):
            for request in coming[: script.arriving]:
                engine.submit(request)
            del coming[: script.arriving]
            for name, output in outputs.items():
                if chance.random() < script.parking and not output.ended:
                    (engine.resume if name in parked else engine.park)(name)
                    parked ^= {name}
                if chance.random() < script.cancelling:
                    engine.cancel(name)
            engine._loop.step()
            if all(output.ended for output in outputs.values()):
                return
        raise AssertionError(f"never ended: {[n for n, each in outputs.items() if not each.ended]}")
