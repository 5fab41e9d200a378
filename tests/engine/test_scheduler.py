"""The scheduler against a made-up model: whatever happens to rows, their tokens stay the same.

The model's next token is a hash of the row's LoRAs and all its tokens; a KV page remembers which
tokens were written to it, so that a stale, shared or moved page shows as a wrong token.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Collection, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.device import DeviceAdapter
from lorastack.config import EngineConfig
from lorastack.engine.batch import Batch, Draft, RowResult, RowStep
from lorastack.engine.costs import Costs
from lorastack.engine.pace import MIN_TOKENS, Pace
from lorastack.engine.pages import Pages
from lorastack.engine.row import Row
from lorastack.engine.scheduler import Scheduler
from lorastack.engine.speculator import Speculator
from lorastack.errors import DataLossError, InternalError
from lorastack.layout import AdapterLayout
from lorastack.request import (
    FinishReason,
    GeneratedToken,
    HeadsUse,
    LoraUse,
    Request,
    RowEvent,
    SamplingParams,
    SpeculationParams,
    StopParams,
    TokenSource,
)
from lorastack.speculation.accept import accept
from lorastack.speculation.cost import CostCurve
from tests.helpers.costs import CheapDrafts

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

    def try_acquire(self, digest: str) -> DeviceAdapter | None:
        acquired = self.acquire([digest])
        return acquired[0] if acquired else None

    def prefetch(self, digests: Collection[str]) -> None:
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
        return step.page_table[index // PAGE] * PAGE + index % PAGE

    def _row(self, step: RowStep) -> RowResult:
        for index, token in enumerate(step.token_ids):
            self.slots[self._slot(step, step.committed + index)] = token
        if not step.samples:
            return RowResult()
        loras = step.request.loras
        past = [self.slots[self._slot(step, i)] for i in range(step.committed)]
        if step.tree is None:
            tokens = (next_token(loras, past + list(step.token_ids)),)
            return RowResult(tokens=tokens, draft=self._draft(step, past + list(step.token_ids)))
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
            draft=self._draft(step, now),
        )

    def _draft(self, step: RowStep, tokens: list[int]) -> Draft | None:
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
        return Draft(tuple(ids), (tuple(map(math.log, chances)),) * NUM_HEADS)


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
        **config: int,
    ) -> None:
        self.chance = random.Random(seed)
        self.pages = Pages(num_pages, PAGE)
        self.pool = Pool(self.chance)
        self.model = Model(num_pages, self.chance)
        limits = EngineConfig(page_size=PAGE, **config)
        self.pace = Pace(limits.max_step_tokens)
        self.scheduler = Scheduler(
            limits,
            self.pages,
            self.pool,  # type: ignore[arg-type]
            self.pace,
            Speculator(costs or CheapDrafts(), limits.max_nodes, {}),
            frozenset({0}),
            lambda id, source, logprobs: GeneratedToken(id=id, source=source, logprobs=logprobs),
        )
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, RowEvent] = {}

    def step(self) -> Batch | None:
        batch = self.scheduler.schedule()
        if batch is not None:
            self.scheduler.update(self.model.run(batch))
        for event in self.scheduler.take_events():
            assert event.request_id not in self.last, "an event after the last one"
            self.tokens.setdefault(event.request_id, []).extend(t.id for t in event.tokens)
            if event.final or event.error:
                self.last[event.request_id] = event
        return batch

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if self.scheduler.num_rows == 0:
                return
            self.step()
        raise AssertionError("rows do not end")

    def assert_idle(self) -> None:
        assert self.pages.num_held == 0
        assert not any(self.pool.pins.values())


requests = st.lists(
    st.tuples(
        st.lists(st.integers(1, 2), min_size=1, max_size=20),
        st.integers(1, 20),
        st.sampled_from([(), ("a",), ("b",), ("a", "b")]),
        st.sampled_from([None, "heads1", "heads2"]),
        st.booleans(),
        st.sampled_from([None, 0, 1, 2]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(10, 24), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**16))
def test_tokens_survive_everything(
    rows: list[tuple[list[int], int, tuple[str, ...], str | None, bool, int | None]],
    num_pages: int,
    max_rows: int,
    max_step_tokens: int,
    seed: int,
) -> None:
    world = World(num_pages, seed, max_rows=max_rows, max_step_tokens=max_step_tokens)
    expected = {}
    for index, (prompt, max_new, loras, heads, ignore_eos, max_nodes) in enumerate(rows):
        request = make_request(
            str(index),
            prompt,
            max_new,
            ignore_eos=ignore_eos,
            loras=tuple(LoraUse(lora_id=name, digest=name) for name in loras),
            heads=HeadsUse(medusa_id=heads, digest=heads) if heads else None,
            speculation=SpeculationParams(max_nodes=max_nodes),
        )
        expected[request.request_id] = plain(request, eos=0)
        world.scheduler.add(make_row(request))
        for _ in range(world.chance.randrange(3)):
            world.step()
        if world.chance.random() < 0.3:
            row = world.scheduler.find(str(world.chance.randrange(index + 1)))
            if row is not None:
                row.parked = True
                world.step()
                row.parked = False
    world.run()
    assert world.tokens == expected
    for index, (prompt, *_) in enumerate(rows):
        final = world.last[str(index)].final
        assert final is not None
        assert final.generated_tokens == len(expected[str(index)])
        stats = final.speculation
        assert stats.accepted[TokenSource.HEADS] == sum(stats.accepted_by_head)
        assert final.cached_prompt_tokens < len(prompt)
    world.assert_idle()


def test_prompt_chunks_and_decode_rows_share_a_step() -> None:
    world = World(64, max_step_tokens=5)
    world.scheduler.add(make_row(make_request("short", [1], 30, ignore_eos=True)))
    world.step()
    world.scheduler.add(make_row(make_request("long", [2] * 40, 1)))
    batch = world.step()
    assert batch is not None
    assert sorted(len(step.token_ids) for step in batch.steps) == [1, 5]


def test_a_prompt_takes_less_beside_a_row_that_decodes() -> None:
    world = World(64, max_step_tokens=30)
    world.scheduler.add(make_row(make_request("short", [1], 30, ignore_eos=True)))
    world.step()
    world.pace.record(prompt_tokens=0, decoding=True, seconds=1.0)
    world.pace.record(prompt_tokens=4, decoding=True, seconds=9.0)
    world.scheduler.add(make_row(make_request("long", [2] * 40, 1)))
    batch = world.step()
    assert batch is not None
    assert sorted(len(step.token_ids) for step in batch.steps) == [1, MIN_TOKENS]


def test_drafts_shrink_as_rows_come_and_end_where_tokens_cost_more() -> None:
    drafted: dict[int, set[int]] = {}
    for num_rows in (1, 2, 4, 5):
        world = World(64, costs=Costs(CostCurve([(1, 1.0), (5, 1.01), (6, 9.0)])), max_rows=8)
        for index in range(num_rows):
            heads = HeadsUse(medusa_id="heads1", digest="heads1")
            request = make_request(str(index), [1, 2], 20, heads=heads, ignore_eos=True)
            world.scheduler.add(make_row(request))
        drafted[num_rows] = set()
        while world.scheduler.num_rows:
            batch = world.step()
            if batch and len(batch.steps) == num_rows:
                nodes = [step.tree.num_nodes - 1 if step.tree else 0 for step in batch.steps]
                assert sum(nodes) <= 5 - num_rows
                drafted[num_rows] |= set(nodes)
    assert max(drafted[1]) == 4 > max(drafted[2]) > max(drafted[4]) == 1
    assert drafted[5] == {0}


def test_equal_prompts_share_pages_only_with_equal_adapters() -> None:
    world = World(64)
    prompt = [1, 2] * 8
    lora = (LoraUse(lora_id="a", digest="a"),)
    for name, loras in (("first", lora), ("same", lora), ("base", ())):
        world.scheduler.add(make_row(make_request(name, prompt, 2, loras=loras, ignore_eos=True)))
        world.run()
    cached = {}
    for name, event in world.last.items():
        assert event.final is not None
        cached[name] = event.final.cached_prompt_tokens
    assert cached == {"first": 0, "same": 12, "base": 0}


def test_a_failed_step_ends_its_rows_and_frees_everything() -> None:
    world = World()
    world.scheduler.add(make_row(make_request("x", [1] * 5, 9)))
    world.scheduler.schedule()
    world.scheduler.fail(InternalError("boom"))
    assert [event.error and event.error.message for event in world.scheduler.take_events()] == [
        "boom"
    ]
    assert world.scheduler.num_rows == 0
    world.assert_idle()


@pytest.mark.parametrize("part", ["lora", "heads"])
def test_an_adapter_that_cannot_load_ends_its_row_alone(part: str) -> None:
    world = World()
    world.scheduler.add(make_row(make_request("good", [1] * 5, 3, ignore_eos=True)))
    loras = (LoraUse(lora_id="l", digest="broken" if part == "lora" else "fine"),)
    heads = HeadsUse(medusa_id="h", digest="broken") if part == "heads" else None
    world.scheduler.add(make_row(make_request("bad", [1] * 5, 3, loras=loras, heads=heads)))
    world.run()
    assert isinstance(world.last["bad"].error, DataLossError)
    assert len(world.tokens["good"]) == 3
    world.assert_idle()


def test_cancel_deadline_and_time_limit_end_a_row_within_one_step() -> None:
    world = World()
    for name, fields in (("cancel", {}), ("deadline", {"deadline": 0.0})):
        world.scheduler.add(make_row(make_request(name, [1] * 5, 50, ignore_eos=True, **fields)))
    limited = Request(
        request_id="limit",
        prompt_ids=(1,),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=50, time_limit=0.0),
    )
    world.scheduler.add(make_row(limited))
    row = world.scheduler.find("cancel")
    assert row is not None
    row.cancelled = True
    world.step()
    assert {
        name: event.final and event.final.finish_reason for name, event in world.last.items()
    } == {
        "cancel": FinishReason.CANCELLED,
        "deadline": None,
        "limit": FinishReason.TIME_LIMIT,
    }
    assert world.last["deadline"].error is not None
    world.assert_idle()


def test_parked_rows_give_way_to_running_ones() -> None:
    world = World(6)
    world.scheduler.add(make_row(make_request("slow", [1] * 12, 8, ignore_eos=True)))
    while world.scheduler.num_waiting or world.pages.num_held == 0:
        world.step()
    row = world.scheduler.find("slow")
    assert row is not None
    row.parked = True
    world.scheduler.add(make_row(make_request("next", [2] * 12, 8, ignore_eos=True)))
    while "next" not in world.last:
        world.step()
    row.parked = False
    world.run()
    assert world.tokens["slow"] == plain(row.request, eos=-1)
    world.assert_idle()


def test_a_parked_row_keeps_its_slot_for_one_that_cannot_start() -> None:
    world = World(16, max_rows=1)
    world.scheduler.add(make_row(make_request("slow", [1] * 12, 8, ignore_eos=True)))
    while world.pages.num_held == 0:
        world.step()
    row = world.scheduler.find("slow")
    assert row is not None
    row.parked = True
    world.pool.missing.add("late")
    lora = LoraUse(lora_id="late", digest="late", scale=1.0)
    world.scheduler.add(make_row(make_request("next", [2] * 4, 2, loras=(lora,))))
    world.step()
    assert row.pages
    world.pool.missing.clear()
    while "next" not in world.last:
        world.step()
    assert not row.pages
