"""The scheduler against a made-up model: whatever happens to rows, their tokens stay the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.engine.costs import Costs
from lorastack.engine.pace import MIN_TOKENS
from lorastack.engine.speculator import Speculator
from lorastack.errors import DataLossError
from lorastack.request import (
    FinishReason,
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
    TokenSource,
)
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.cost import CostCurve
from tests.engine.made_up import World, make_request, make_row, plain
from tests.helpers.costs import CheapHeads

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
            row = world.scheduler.rows.find(str(world.chance.randrange(index + 1)))
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
    assert sorted(len(step.token_ids) for step in batch.steps) == [1, 4]


def test_a_prompt_chunk_of_one_token_is_a_prompt() -> None:
    """Its last token alone makes a token, as any last token does."""
    world = World(64, max_step_tokens=1)
    world.scheduler.add(make_row(make_request("row", [2] * 3, 2, ignore_eos=True)))
    seen = []
    while (batch := world.step()) is not None:
        assert [len(step.token_ids) for step in batch.steps] == [1]
        seen.append((batch.prompt_tokens, batch.steps[0].decodes))
    assert seen == [(1, False), (1, False), (0, True), (0, True)]


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


@pytest.mark.parametrize("num_rows, tokens", [(1, 32), (2, 64), (3, 96), (6, 96)])
def test_prompts_are_read_faster_where_more_rows_wait(num_rows: int, tokens: int) -> None:
    """Of those that could run: four slots, one of them for the row that decodes."""
    world = World(64, max_rows=4, max_step_tokens=500)
    world.scheduler.add(make_row(make_request("short", [1], 30, ignore_eos=True)))
    world.step()
    world.pace.record(prompt_tokens=0, decoding=True, seconds=1.0)
    world.pace.record(prompt_tokens=64, decoding=False, seconds=2.0)
    for index in range(num_rows):
        world.scheduler.add(make_row(make_request(str(index), [2, index + 1] * 30, 1)))
    parked = make_row(make_request("parked", [1] * 60, 1))
    parked.parked = True
    world.scheduler.add(parked)
    batch = world.step()
    assert batch is not None
    assert sum(len(step.token_ids) for step in batch.steps) == 1 + tokens


def test_drafts_shrink_as_rows_come_and_end_where_tokens_cost_more() -> None:
    drafted: dict[int, set[int]] = {}
    for num_rows in (1, 2, 4, 5):
        world = World(64, costs=Costs(CostCurve([(1, 1.0), (5, 1.01), (6, 9.0)])), max_rows=8)
        for index in range(num_rows):
            heads = HeadsUse(medusa_id="heads1", digest="heads1")
            request = make_request(str(index), [1, 2], 20, heads=heads, ignore_eos=True)
            world.scheduler.add(make_row(request))
        drafted[num_rows] = set()
        while len(world.scheduler.rows):
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


def test_a_private_part_and_what_it_corrects_are_pinned_both_or_neither() -> None:
    """A row waits for neither; it drafts as soon as both are there."""
    world = World(max_rows=1)
    heads = HeadsUse(medusa_id="h", digest="heads1", shared_id="s", shared_digest="heads0")
    world.pool.chance = random.Random(0)
    for name in ("first", "second"):
        world.scheduler.add(make_row(make_request(name, [1] * 5, 60, heads=heads, ignore_eos=True)))
    seen = set()
    for missing in ({"heads0"}, {"heads1"}, set[str]()):
        world.pool.missing = missing
        for _ in range(20):
            batch = world.scheduler.schedule()
            assert batch is not None
            (step,) = batch.steps
            used = step.adapters.heads
            if used is not None:
                assert not missing
                assert (used.whole.digest, used.private and used.private.digest) == heads.digests
                assert used.digest == "heads1"
            pins = {"heads0": 1, "heads1": 1} if used else {}
            assert +world.pool.pins == pins
            seen.add(used is not None)
            world.scheduler.update(world.model.run(batch))
    assert seen == {True, False}
    assert {"heads0", "heads1"} <= world.pool.prefetched  # for the row that waits
    first = next(iter(world.scheduler.rows))
    assert first.uses("heads0") and first.uses("heads1")
    world.run()
    world.assert_idle()


def test_trees_start_from_what_the_heads_say_of_themselves() -> None:
    """Until something was learnt. A part's knowledge goes by its own digest."""
    prior = Calibration()
    prior.record(0, -0.5, accepted=True)
    heads = HeadsUse(medusa_id="h", digest="heads1", shared_digest="heads0", prior=prior.to_json())
    learnt = Calibration()
    learnt.record(0, -0.5, accepted=False)
    for known, expected in (({}, prior), ({"heads1": learnt}, learnt)):
        calibrations = dict[str, Calibration](known)
        speculator = Speculator(CheapHeads(), 8, 64, calibrations)
        row = make_row(make_request("a", [1, 2], 9, heads=heads))
        speculator.choose_heads([row])
        assert calibrations.keys() == {"heads1"}
        assert calibrations["heads1"].to_json() == expected.to_json()
        speculator.forget("heads1")
        speculator.choose_heads([row])
        assert calibrations["heads1"].to_json() == prior.to_json()


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
    row = world.scheduler.rows.find("cancel")
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
    while world.scheduler.rows.num_waiting or world.pages.num_held == 0:
        world.step()
    row = world.scheduler.rows.find("slow")
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
    row = world.scheduler.rows.find("slow")
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
