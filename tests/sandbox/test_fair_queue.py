"""Those who wait for a seat are served round robin by caller."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from lorastack.errors import ResourceExhaustedError, UnavailableError
from lorastack.sandbox.fair_queue import FairQueue


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def queued(queue: FairQueue[str], *callers: str) -> list[asyncio.Task[str]]:
    """A task for each caller, waiting in this order."""
    tasks = [asyncio.create_task(queue.take(caller)) for caller in callers]
    await asyncio.sleep(0)
    return tasks


def test_callers_take_turns_however_many_places_one_has() -> None:
    async def check() -> None:
        queue = FairQueue(["seat"], 9)
        assert await queue.take("a") == "seat"
        tasks = await queued(queue, "a", "a", "a", "b", "c", "b")
        order: list[str] = []

        async def note(task: asyncio.Task[str], name: str) -> None:
            seat = await task
            order.append(name)
            queue.give(seat)

        names = ("a1", "a2", "a3", "b1", "c1", "b2")
        queue.give("seat")
        await asyncio.gather(*map(note, tasks, names))
        assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]

    run(check())


def test_a_caller_who_fills_the_queue_is_refused_and_makes_room_for_others() -> None:
    async def check() -> None:
        queue = FairQueue(["seat"], 3)
        await queue.take("greedy")
        greedy = await queued(queue, "greedy", "greedy", "greedy")
        with pytest.raises(ResourceExhaustedError, match="3 calls wait"):
            await queue.take("greedy")
        other, another = await queued(queue, "other", "another")
        for task in greedy[1:]:  # the newest places of the longest queue
            with pytest.raises(ResourceExhaustedError):
                await task
        assert not greedy[0].done()
        assert queue.num_waiting == 3
        with pytest.raises(ResourceExhaustedError):
            await queue.take("a third")
        for task in (greedy[0], other, another):
            queue.give("seat")
            assert await task == "seat"

    run(check())


def test_who_leaves_the_queue_or_is_cancelled_with_a_seat_loses_none() -> None:
    async def check() -> None:
        queue = FairQueue(["seat"], 9)
        await queue.take("a")
        gone, waits = await queued(queue, "a", "b")
        gone.cancel()
        await asyncio.wait([gone])
        assert queue.num_waiting == 1
        queue.give("seat")
        waits.cancel()  # it has the seat and does not know it yet
        await asyncio.wait([waits])
        assert await queue.take("c") == "seat"
        late = await queued(queue, "d", "e")
        queue.fail(UnavailableError("over"))
        for task in late:
            with pytest.raises(UnavailableError):
                await task

    run(check())


def test_who_leaves_in_the_moment_of_its_turn_takes_no_seat_away() -> None:
    async def check() -> None:
        queue = FairQueue(["seat"], 2)
        await queue.take("a")
        gone, waits = await queued(queue, "a", "b")
        gone.cancel()
        queue.give("seat")  # before `gone` has run once more
        assert await waits == "seat"
        gone, waits = await queued(queue, "a", "a")
        waits.cancel()
        assert not (await queued(queue, "b"))[0].done()  # it waits in the place that was left
        gone.cancel()
        queue.fail(UnavailableError("over"))
        queue.give("seat")
        assert await queue.take("c") == "seat"

    run(check())
