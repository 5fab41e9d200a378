"""What one row makes raise, wherever in a step, ends that row: the others get their tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.engine.apart import run_apart
from lorastack.engine.batch import Batch, RowResult
from lorastack.engine.row import Row
from lorastack.engine.runner import StepResults
from lorastack.engine.speculator import Speculator
from lorastack.errors import InternalError, LorastackError, Reason, breaks_device
from lorastack.request import HeadsUse, LoraUse, Request
from lorastack.speculation.lookup import Continuation
from lorastack.speculation.proposal import Proposal
from tests.engine.made_up import Model, World, make_request, make_row, plain
from tests.helpers.costs import CheapHeads

LORA, HEADS = LoraUse(lora_id="a", digest="a"), HeadsUse(medusa_id="h", digest="heads1")


def requests(num: int) -> list[Request]:
    """With and without adapters, of several lengths."""
    return [
        make_request(
            str(index),
            [1 + index % 2] * (3 + 2 * index),
            12,
            ignore_eos=True,
            loras=(LORA,) if index % 3 == 0 else (),
            heads=HEADS if index % 2 == 0 else None,
        )
        for index in range(num)
    ]


class FaultyModel(Model):
    """Raises, having written all keys and values, whenever one of the guilty is in the batch."""

    def __init__(self, num_pages: int, chance: random.Random, guilty: Collection[str]) -> None:
        super().__init__(num_pages, chance)
        self._guilty = guilty
        self.num_runs = 0

    def run(self, batch: Batch) -> list[RowResult]:
        results = super().run(batch)
        self.num_runs += 1
        if any(step.request.request_id in self._guilty and step.samples for step in batch.steps):
            raise RuntimeError("boom")
        return results


def check(world: World, asked: list[Request], guilty: Collection[str]) -> None:
    """The guilty ended STEP_FAILED, the rest as ever, and nothing is held."""
    world.run()
    for request in asked:
        last = world.last[request.request_id]
        if request.request_id in guilty:
            assert isinstance(last.error, InternalError)
            assert last.error.reason is Reason.STEP_FAILED
            assert "boom" not in last.error.message
        else:
            assert world.tokens[request.request_id] == plain(request, eos=-1)
    world.assert_idle()


@given(st.integers(1, 9), st.sets(st.integers(0, 8)), st.integers(0, 2**16))
def test_rows_that_make_a_step_fail_end_and_no_others(num: int, bad: set[int], seed: int) -> None:
    guilty = {str(index) for index in bad}
    world = World(64, seed, max_rows=9)
    world.model = FaultyModel(64, world.chance, guilty)
    asked = requests(num)
    for request in asked:
        world.scheduler.add(make_row(request))
    check(world, asked, guilty & {request.request_id for request in asked})


def test_one_bad_row_among_many_is_found_in_few_runs() -> None:
    chance = random.Random(0)
    world = World(128, max_rows=32, max_step_tokens=512)
    world.pool.acquire([])
    for request in requests(1) + [make_request(str(n), [1, 2], 9) for n in range(1, 32)]:
        world.scheduler.add(make_row(request))
    batch = None
    while batch is None or len(batch.steps) < 32:
        batch = world.scheduler.schedule()
        assert batch is not None
        if len(batch.steps) < 32:
            world.scheduler.update(world.model.run(batch))
    model = FaultyModel(128, chance, {"17"})
    results = run_apart(lambda part: StepResults(model.run(part)), batch)
    failed = [s for s, row in zip(batch.steps, results.rows, strict=True) if row.error]
    assert [step.request.request_id for step in failed] == ["17"]
    assert not results.whole
    assert model.num_runs == 1 + 2 * 5


def unspecified() -> torch.AcceleratorError:
    return torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with ...")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (unspecified(), True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
            True,
        ),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), False),
        (RuntimeError("boom"), False),
        (ValueError("CUDA error: not a device's"), False),
    ],
)
def test_what_breaks_a_device(error: Exception, expected: bool) -> None:
    assert breaks_device(error) is expected


@pytest.mark.parametrize("error", [unspecified(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_step_that_broke_the_device_is_not_run_again(error: Exception) -> None:
    """One for which there was no memory is, by halves."""
    world = World(64, max_rows=4)
    for request in requests(4):
        world.scheduler.add(make_row(request))
    batch = world.scheduler.schedule()
    assert batch is not None
    sizes: list[int] = []

    def run(part: Batch) -> StepResults:
        sizes.append(len(part.steps))
        if sizes == [len(batch.steps)]:
            raise error
        return StepResults(world.model.run(part))

    if breaks_device(error):
        with pytest.raises(type(error)):
            run_apart(run, batch)
        assert len(sizes) == 1
    else:
        assert all(row.error is None for row in run_apart(run, batch).rows)
        assert sizes == [4, 2, 2]


def explode(*args: object, **kwargs: object) -> None:
    raise ValueError("boom")


def in_text(world: World, row: Row, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row, "text", type("Text", (), {"match": None, "push": explode})())


def in_its_tokens(world: World, row: Row, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row, "processor", type("Processor", (), {"commit": explode})())


def in_its_deadline(world: World, row: Row, patch: pytest.MonkeyPatch) -> None:
    row.submitted = "never"  # type: ignore[assignment]
    object.__setattr__(row.request.stop, "time_limit", 1.0)


def in_its_pages(world: World, row: Row, patch: pytest.MonkeyPatch) -> None:
    publish = world.scheduler._holds.publish
    patch.setattr(
        world.scheduler._holds,
        "publish",
        lambda other, tokens: explode() if other is row else publish(other, tokens),
    )


@pytest.mark.parametrize("spoil", [in_text, in_its_tokens, in_its_deadline, in_its_pages])
def test_a_row_that_fails_between_steps_ends_alone(
    spoil: Callable[[World, Row, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(64, max_rows=5)
    asked = requests(5)
    rows = [make_row(request) for request in asked]
    for row in rows:
        world.scheduler.add(row)
    world.step()
    spoil(world, rows[2], monkeypatch)
    check(world, asked, {"2"})


@pytest.mark.parametrize("digest", ["a", "heads1"])
def test_an_adapter_whose_acquisition_raises_ends_its_rows_alone(
    digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(64, max_rows=5)
    acquire = world.pool.acquire
    monkeypatch.setattr(
        world.pool,
        "acquire",
        lambda digests: explode() if digest in digests else acquire(digests),
    )
    asked = requests(5)
    for request in asked:
        world.scheduler.add(make_row(request))
    uses = {"a": {"0", "3"}, "heads1": {"0", "2", "4"}}
    check(world, asked, uses[digest])


@pytest.mark.parametrize("part", ["choose_heads", "trees", "note", "_learn"])
def test_a_fault_in_drafting_costs_no_token(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(64, max_rows=5)
    monkeypatch.setattr(world.scheduler._speculator, part, explode)
    asked = requests(5)
    for request in asked:
        world.scheduler.add(make_row(request))
    check(world, asked, set())


def in_its_grammar(row: Row, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row, "matcher", type("Matcher", (), {"forced": explode})())


def in_its_lookup(row: Row, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row, "lookup", type("Lookup", (), {"num_tokens": 0, "push": explode})())


def in_its_nodes(row: Row, patch: pytest.MonkeyPatch) -> None:
    proposal = Proposal(ids=((), ()), logprobs=())
    patch.setattr(row, "proposal", proposal)


@pytest.mark.parametrize("spoil", [in_its_grammar, in_its_lookup, in_its_nodes])
def test_a_row_whose_drafting_raises_goes_on_undrafted_alone(
    spoil: Callable[[Row, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator = Speculator(CheapHeads(), max_nodes=8, max_step_tokens=64, calibrations={})
    rows = [make_row(make_request(str(index), [1, 2, 3] * 3, 12)) for index in range(3)]
    sound = speculator.trees(rows, fixed_tokens=3, num_samples=3)
    assert None not in sound
    rows[1].continuation = stale = Continuation(5, (6,))
    spoil(rows[1], monkeypatch)
    trees = speculator.trees(rows, fixed_tokens=3, num_samples=3)
    assert trees == [sound[0], None, sound[2]]
    assert rows[1].continuation != stale


def test_a_lookup_that_raises_costs_its_row_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first chunk of the prompt on."""
    world = World(64, max_rows=5)
    asked = requests(5)
    for request in asked:
        world.scheduler.add(row := make_row(request))
        in_its_lookup(row, monkeypatch)
    check(world, asked, set())


@pytest.mark.parametrize("raising", ["_trees", "_step", None])
def test_whatever_stops_a_schedule_everything_can_be_freed(
    raising: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it stops between taking adapters or pages and planning with them."""
    world = World(64, max_rows=5)
    for request in requests(6):
        world.scheduler.add(make_row(request))
    world.step()
    if raising:
        monkeypatch.setattr(world.scheduler, raising, explode)
    try:
        while world.scheduler.schedule() is None:
            pass
    except ValueError:
        assert raising
    error: LorastackError = InternalError("all end")
    world.scheduler.end_all(error)
    events = world.scheduler.take_events()
    assert [event.error for event in events] == [error] * 6
    assert not len(world.scheduler.rows)
    world.assert_idle()
