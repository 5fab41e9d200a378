"""What no next step waits for is done beside it: once, in order, and at once if none follows."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch

from lorastack.engine.batch import Batch, RowResult
from lorastack.engine.inbox import Inbox
from lorastack.engine.loop import MAX_FAULTS, StepLoop
from lorastack.engine.row import Row
from lorastack.engine.runner import StepResults
from lorastack.engine.speculator import Speculator
from lorastack.errors import InternalError
from lorastack.request import HeadsUse, RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.proposal import Proposal
from tests.engine.made_up import World, make_request, make_row
from tests.helpers.costs import CheapHeads

HEADS = HeadsUse(medusa_id="h", digest="heads1")


class Runner:
    """The made-up model behind a device that works by itself. failing: what raises, by step."""

    def __init__(self, world: World, log: list[str], overlaps: bool) -> None:
        self.overlaps = overlaps
        self.failing: dict[str, Exception] = {}  # "launch" or "wait"; "launch a": of that row
        self._world = world
        self._log = log

    def run(self, batch: Batch, meanwhile: Callable[[], None] | None = None) -> StepResults:
        ids = " ".join(step.request.request_id for step in batch.steps)
        self._note("launch", ids)
        if self.overlaps and meanwhile is not None:
            meanwhile()
        self._note("wait", ids)
        return StepResults(self._world.model.run(batch))

    def _note(self, what: str, ids: str) -> None:
        self._log.append(what)
        for key in (what, *(f"{what} {each}" for each in ids.split())):
            if key in self.failing:
                raise self.failing[key]


class Loop:
    """A step loop over the made-up model, and what was done in it, in order."""

    def __init__(self, overlaps: bool = True) -> None:
        self.log: list[str] = []
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, RowEvent] = {}
        self.world = World(64, max_rows=4)
        self.runner = Runner(self.world, self.log, overlaps)
        self.inbox = Inbox(max_queue=8)
        self.failures: list[BaseException] = []
        self.costs = Mock()
        self.costs.record = lambda *args: self.log.append("costs")
        self.refusing = 0  # calls of `on_events` that raise
        pool = Mock(blocked=True)
        self.loop = StepLoop(
            inbox=self.inbox,
            scheduler=self.world.scheduler,
            runner=self.runner,  # type: ignore[arg-type]
            pages=self.world.pages,
            pool=pool,
            pace=self.world.pace,
            costs=self.costs,
            speculator=self.world.scheduler._speculator,
            on_events=self._take,
            on_failure=self.failures.append,
        )

    def add(self, name: str, max_new: int = 4) -> Row:
        row = make_row(make_request(name, [1, 2, 3], max_new, ignore_eos=True))
        self.inbox.submit(lambda: self.world.scheduler.add(row))
        return row

    def step(self) -> list[str]:
        """What one turn of the loop did."""
        self.log.clear()
        self.loop.step()
        return list(self.log)

    def _take(self, events: list[RowEvent]) -> None:
        if self.refusing:
            self.refusing -= 1
            raise RuntimeError("nobody takes events")
        for event in events:
            assert event.request_id not in self.last, "an event after the last one"
            self.tokens.setdefault(event.request_id, []).extend(t.id for t in event.tokens)
            if event.final or event.error:
                self.last[event.request_id] = event
        self.log.append("events")


def test_it_is_done_between_a_step_and_the_wait_for_it() -> None:
    loop = Loop()
    row = loop.add("a", max_new=3)
    assert loop.step() == ["launch", "wait"]  # the prompt's, which makes a token
    assert loop.step() == ["launch", "costs", "events", "wait"]
    assert loop.tokens["a"] == row.tokens[3:4]
    while not loop.last:
        log = loop.step()
    assert log == ["launch", "costs", "events", "wait", "costs", "events"]  # none follows
    assert loop.tokens["a"] == row.tokens[3:]
    assert loop.inbox.num_rows == 0


def test_without_overlap_it_is_done_behind_each_step() -> None:
    loop = Loop(overlaps=False)
    row = loop.add("a")
    while not loop.last:
        assert loop.step() == ["launch", "wait", "costs", "events"]
        assert loop.tokens["a"] == row.tokens[3:]


def test_it_is_done_at_once_when_no_row_can_run() -> None:
    loop = Loop()
    row = loop.add("a")
    loop.step()
    row.parked = True
    assert loop.step() == ["costs", "events"]
    assert loop.tokens["a"] == row.tokens[3:] != []
    assert loop.inbox.state.num_parked == 1
    row.parked, row.cancelled = False, True
    assert loop.step() == ["events"]
    assert loop.last["a"].final is not None


@pytest.mark.parametrize("place", ["launch", "wait"])
def test_a_step_that_is_run_by_halves_does_it_once(place: str) -> None:
    loop = Loop()
    rows = [loop.add(name) for name in "abc"]
    loop.step()
    loop.runner.failing[f"{place} b"] = RuntimeError("boom")
    log = loop.step()
    assert log.count("launch") == 5 and log.count("events") == log.count("costs") == 1
    if place == "wait":
        assert log[:3] == ["launch", "costs", "events"]
    assert all(loop.tokens[name] == rows[index].tokens[3:4] for index, name in enumerate("abc"))
    while len(loop.last) < 3:
        loop.step()
    assert isinstance(loop.last["b"].error, InternalError)
    for name, row in zip("ac", (rows[0], rows[2]), strict=True):
        assert loop.tokens[name] == row.tokens[3:] and loop.last[name].final is not None


def test_a_step_that_never_begins_keeps_nothing_back() -> None:
    """Its rows end, so no step follows."""
    loop = Loop()
    row = loop.add("a")
    loop.step()
    loop.runner.failing["launch a"] = RuntimeError("boom")
    loop.step()
    assert loop.tokens["a"] == row.tokens[3:4]
    assert loop.last["a"].error is not None


def test_what_it_raises_is_the_fault_of_no_row_and_loses_nothing() -> None:
    loop = Loop()
    rows = {name: loop.add(name) for name in "ab"}
    loop.step()
    loop.refusing = 1
    with pytest.raises(RuntimeError, match="nobody takes events"):
        loop.step()
    assert loop.log == ["launch", "costs", "wait"], "the step is not run again"
    loop.loop._start_over(RuntimeError("nobody takes events"))
    loop.step()
    for name, row in rows.items():
        assert loop.tokens[name] == row.tokens[3:]
        assert "the server failed" in str(loop.last[name].error)


def close_in_second_step(loop: Loop) -> None:
    """`run` until a step whose events are not out yet has closed the inbox."""
    run, num_runs = loop.runner.run, 0

    def close(batch: Batch, meanwhile: Callable[[], None] | None = None) -> StepResults:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 2:
            loop.inbox.close()
        return run(batch, meanwhile)

    loop.runner.run = close  # type: ignore[method-assign]
    loop.loop.run()


def test_the_end_keeps_nothing_back() -> None:
    loop = Loop()
    row = loop.add("a", max_new=9)
    close_in_second_step(loop)
    assert loop.tokens["a"] == row.tokens[3:] and len(row.tokens) >= 5
    assert loop.last["a"].error is not None and not loop.failures


@pytest.mark.parametrize("place", ["launch", "wait"])
def test_a_broken_device_keeps_nothing_back(place: str) -> None:
    loop = Loop()
    row = loop.add("a", max_new=9)
    loop.step()
    broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    loop.runner.failing[place] = broken
    loop.loop.run()
    assert loop.tokens["a"] == row.tokens[3:] != []
    assert loop.last["a"].error is not None and loop.failures == [broken]
    assert loop.inbox.state.num_rows == 0


def test_events_that_nobody_ever_takes_end_the_loop() -> None:
    loop = Loop()
    loop.add("a", max_new=9)
    loop.refusing = 99
    with pytest.raises(RuntimeError, match="nobody takes events"):
        loop.loop.run()
    assert len(loop.failures) == 1
    assert 99 - loop.refusing == MAX_FAULTS + 1 + 1, "once more at the end"


def test_what_is_noted_is_learnt_before_anybody_asks() -> None:
    speculator = Speculator(CheapHeads(), max_nodes=8, max_step_tokens=64, calibrations={})
    row = make_row(make_request("a", [1, 2, 3], 9, heads=HEADS))
    row.proposal = Proposal(((4, 5),), ((-0.5, -1.5),))
    fresh = Calibration()
    fresh.record_proposal(row.proposal, (5,))
    speculator.note(row, RowResult(tokens=(5,)))
    row.proposal = None  # as the next step's takes its place
    assert not speculator.calibrations
    learned = speculator.take_learned()
    assert {key: each.to_json() for key, each in learned.items()} == {"heads1": fresh.to_json()}
    speculator.learn()
    assert speculator.take_learned() == {}


def test_what_is_noted_brings_no_forgotten_heads_back() -> None:
    speculator = Speculator(CheapHeads(), max_nodes=8, max_step_tokens=64, calibrations={})
    row = make_row(make_request("a", [1, 2, 3], 9, heads=HEADS))
    row.proposal = Proposal(((4, 5),), ((-0.5, -1.5),))
    speculator.note(row, RowResult(tokens=(5,)))
    speculator.forget("heads1")
    speculator.learn()
    assert speculator.take_learned() == {} == speculator.calibrations
