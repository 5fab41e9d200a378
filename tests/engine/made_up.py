"""A made-up model and a scheduler that runs it.

The model's next token is a hash of the row's LoRAs and all its tokens; a KV page remembers which
tokens were written to it, so that a stale, shared or moved page shows as a wrong token.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.pool import DevicePool
from lorastack.config import EngineConfig
from lorastack.engine.apart import run_apart
from lorastack.engine.batch import Batch, RowResult, RowStep
from lorastack.engine.costs import Costs
from lorastack.engine.pace import Pace
from lorastack.engine.pages import Pages
from lorastack.engine.row import Row
from lorastack.engine.runner import StepResults
from lorastack.engine.scheduler import Scheduler
from lorastack.engine.speculator import Speculator
from lorastack.errors import DataLossError
from lorastack.layout import AdapterLayout
from lorastack.request import (
    LoraUse,
    Request,
    RowEvent,
    SamplingParams,
    StopParams,
)
from lorastack.speculation.accept import accept
from lorastack.speculation.proposal import Proposal
from tests.helpers.costs import CheapHeads

PAGE, VOCAB, NUM_HEADS = 4, 7, 2


class NoText:
    """A row's text when nothing is decoded."""

    match = None

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Pool:
    """Counts pins; a digest is missing every so often, "broken" always fails."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.pins: Counter[str] = Counter()
        self.missing: set[str] = set()
        self.prefetched: set[str] = set()
        self.asked: set[str] = set()

    def acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        self.asked.update(digests)
        if "broken" in digests:
            raise DataLossError("broken")
        if self.missing & set(digests) or (digests and self.chance.random() < 0.2):
            return None
        self.pins.update(digests)
        heads = NUM_HEADS if any(digest.startswith("heads") for digest in digests) else 0
        layout = AdapterLayout(slots={}, scales={}, num_elements=0, itemsize=4, num_heads=heads)
        return tuple(
            DeviceAdapter(digest=digest, buffer=torch.empty(0), layout=layout) for digest in digests
        )

    def try_acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        return self.acquire(digests)

    def prefetch(self, digests: Collection[str], *, together: bool = False) -> None:
        self.prefetched.update(digests)

    def holds(self, digests: Collection[str]) -> bool:
        return not self.missing & set(digests)

    def release(self, digests: Sequence[str]) -> None:
        self.pins.subtract(digests)
        assert all(count >= 0 for count in self.pins.values())


def next_token(loras: Sequence[LoraUse], tokens: Sequence[int]) -> int:
    return zlib.crc32(repr(([u.digest for u in loras], tuple(tokens))).encode()) % VOCAB


class Model:
    """A runner over pages that hold tokens instead of keys and values."""

    def __init__(self, num_pages: int, chance: random.Random) -> None:
        self.slots = [-1] * (num_pages * PAGE)
        self.chance = chance

    def run(self, batch: Batch) -> list[RowResult]:
        written = [
            self._slot(step, step.committed + index)
            for step in batch.steps
            for index in range(len(step.token_ids))
        ]
        assert len(written) == len(set(written)), "two rows write one slot"
        return [self._row(step) for step in batch.steps]

    def _slot(self, step: RowStep, index: int) -> int:
        return step.block_table[index // PAGE] * PAGE + index % PAGE

    def _row(self, step: RowStep) -> RowResult:
        for index, token in enumerate(step.token_ids):
            self.slots[self._slot(step, step.committed + index)] = token
        if not step.samples:
            return RowResult()
        loras = step.request.loras
        past = [self.slots[self._slot(step, i)] for i in range(step.committed)]
        if step.tree is None:
            tokens = (next_token(loras, past + list(step.token_ids)),)
            return RowResult(
                tokens=tokens, proposal=self._propose(step, past + list(step.token_ids))
            )
        tree, upto = step.tree, [*past, step.token_ids[0]]
        accepted = accept(
            [tree],
            lambda nodes: [next_token(loras, upto + tree.path_to(node)) for _, node, _ in nodes],
        )[0]
        for place, node in enumerate(accepted.path, start=1):
            self.slots[self._slot(step, step.committed + place)] = step.token_ids[node]
        now = [*past, step.token_ids[0], *accepted.tokens[:-1]]
        return RowResult(
            tokens=accepted.tokens,
            sources=tuple(tree.sources[node] for node in accepted.path),
            proposal=self._propose(step, now),
        )

    def _propose(self, step: RowStep, tokens: list[int]) -> Proposal | None:
        """Candidates behind the token that `tokens` make next; right about half the time."""
        if not step.num_candidates:
            return None
        future = list(tokens)
        ids = []
        for _ in range(NUM_HEADS + 1):
            future.append(next_token(step.request.loras, future))
        for token in future[-NUM_HEADS:]:
            wrong = [other for other in range(VOCAB) if other != token]
            best = token if self.chance.random() < 0.5 else self.chance.choice(wrong)
            rest = [other for other in range(VOCAB) if other != best]
            self.chance.shuffle(rest)
            ids.append((best, *rest)[: step.num_candidates])
        chances = [0.5, *[0.5 / (VOCAB - 1)] * (VOCAB - 1)][: step.num_candidates]
        return Proposal(tuple(ids), (tuple(map(math.log, chances)),) * NUM_HEADS)


def plain(request: Request, eos: int) -> list[int]:
    tokens = list(request.prompt_ids)
    while len(tokens) - len(request.prompt_ids) < request.stop.max_new_tokens:
        tokens.append(next_token(request.loras, tokens))
        if tokens[-1] == eos and not request.stop.ignore_eos:
            break
    return tokens[len(request.prompt_ids) :]


def make_request(name: str, prompt: Sequence[int], max_new: int, **fields: object) -> Request:
    return Request(
        request_id=name,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=max_new, ignore_eos=bool(fields.pop("ignore_eos", False))),
        **fields,  # type: ignore[arg-type]
    )


def make_row(request: Request, submitted: float = 0.0) -> Row:
    return Row(request=request, text=NoText(), submitted=submitted)  # type: ignore[arg-type]


class World:
    """A scheduler, its pages and pool, and the made-up model."""

    def __init__(
        self,
        num_pages: int = 16,
        seed: int = 0,
        costs: Costs | None = None,
        pool: DevicePool | None = None,
        **config: int,
    ) -> None:
        """pool: in place of `self.pool`."""
        self.chance = random.Random(seed)
        self.pages = Pages(num_pages, PAGE)
        self.pool = Pool(self.chance)
        self.model = Model(num_pages, self.chance)
        limits = EngineConfig(page_size=PAGE, **config)
        self.pace = Pace(limits.max_step_tokens)
        self.scheduler = Scheduler(
            limits,
            self.pages,
            pool or self.pool,  # type: ignore[arg-type]
            self.pace,
            Speculator(costs or CheapHeads(), limits.max_nodes, limits.max_step_tokens, {}),
            frozenset({0}),
        )
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, RowEvent] = {}

    def step(self) -> Batch | None:
        batch = self.scheduler.schedule()
        if batch is not None:
            results = run_apart(lambda part: StepResults(self.model.run(part)), batch)
            self.scheduler.update(results.rows)
            self.scheduler._speculator.learn()
        for event in self.scheduler.take_events():
            assert event.request_id not in self.last, "an event after the last one"
            self.tokens.setdefault(event.request_id, []).extend(t.id for t in event.tokens)
            if event.final or event.error:
                self.last[event.request_id] = event
        return batch

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not len(self.scheduler.rows):
                return
            self.step()
        raise AssertionError("rows do not end")

    def assert_idle(self) -> None:
        assert self.pages.num_held == 0
        assert not any(self.pool.pins.values())
