"""Transfers at once, and what becomes of those that stand still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest

from lorastack.errors import AbortedError, Reason, ResourceExhaustedError
from lorastack.service.edge import places
from lorastack.service.edge.places import PACE, Place, Places, caller_of

NEVER = 1000.0  # seconds
PATIENCE = 30.0  # seconds until a wait for something that must happen gives up


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


def make(together: int = 4, per_caller: int = 2, idle: float = NEVER) -> Places:
    return Places("upload", together=together, per_caller=per_caller, idle=idle)


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("ipv4:10.0.0.7:4321", "ipv4:10.0.0.7"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:4321", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:1", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "ipv6:fe80::/64"),
        ("unix:/run/socket", "unix:"),
        ("unix:", "unix:"),
        ("", ":"),
    ],
)
def test_callers(peer: str, caller: str) -> None:
    context: Any = SimpleNamespace(peer=lambda: peer)
    assert caller_of(context) == caller


async def refused(taken: Places, caller: str) -> ResourceExhaustedError:
    with pytest.raises(ResourceExhaustedError) as caught:
        async with taken.take(caller):
            pytest.fail("a place too many")
    assert caught.value.reason is Reason.TOO_MANY_TRANSFERS
    assert caught.value.retry_after
    return caught.value


@on_a_loop
async def test_places_are_bounded_together_and_of_each_caller() -> None:
    places = make()
    async with AsyncExitStack() as taken:
        for caller in ("a", "a", "b"):
            await taken.enter_async_context(places.take(caller))
        assert "your address" in (await refused(places, "a")).message
        async with places.take("c"):
            assert "your address" not in (await refused(places, "d")).message
        async with places.take("d"):  # the place is free again
            pass
    for caller in ("a", "a"):
        async with places.take(caller):
            pass


async def silent(places: Places, caller: str, began: asyncio.Queue[Place]) -> None:
    async with places.take(caller) as place:
        began.put_nowait(place)
        await place.waits(asyncio.Event().wait())


@on_a_loop
async def test_a_silent_caller_loses_its_place() -> None:
    short, began = make(idle=0.001), asyncio.Queue[Place]()
    with pytest.raises(AbortedError) as caught:
        await silent(short, "a", began)
    assert caught.value.reason is Reason.TRANSFER_IDLE
    async with short.take("a"), short.take("a"):
        pass


@on_a_loop
async def test_only_waiting_for_the_caller_counts() -> None:
    """Not what the server takes for itself, nor waiting that brought bytes again and again."""
    places = make(idle=NEVER)
    async with places.take("a") as place:
        assert place.limit.when() is None
        came = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(came)
        asyncio.get_running_loop().call_soon(came.set_result, "bytes")
        assert await place.waits(waiting) == "bytes"
        assert place.limit.when() is None
        assert place.stalled() == 0.0
        place._silent = place._stalled = NEVER - 1
        place.passed(1)
        assert (place._silent, place._stalled) == (0.0, NEVER - 1)
        place.passed(PACE)
        assert place._stalled == 0.0


@on_a_loop
async def test_messages_without_bytes_are_silence() -> None:
    places = make(idle=0.02)
    with pytest.raises(AbortedError):
        async with places.take("a") as place:
            while True:
                await place.waits(asyncio.sleep(0.005))
                place.passed(0)


@on_a_loop
async def test_the_one_that_stalled_longest_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "STALLED", 50.0)
    of_a, began = make(), asyncio.Queue[Place]()
    tasks = [asyncio.ensure_future(silent(of_a, "a", began)) for _ in range(2)]
    first, second = await began.get(), await began.get()
    await refused(of_a, "a")
    first._stalled, second._stalled = 60.0, 70.0
    async with of_a.take("a"):  # beside the first one
        with pytest.raises(ResourceExhaustedError, match="made way"):
            await tasks[1]
        first._stalled = 0.0
        await refused(of_a, "a")
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    async with of_a.take("a"), of_a.take("a"):
        pass


@on_a_loop
async def test_who_does_not_wait_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of many seconds is the server's time."""
    monkeypatch.setattr(places, "STALLED", 0.0)
    few = make(per_caller=1)
    async with few.take("a") as place:
        place._stalled = NEVER
        assert place.stalled() == 0.0
        monkeypatch.setattr(places, "STALLED", 50.0)
        await refused(few, "a")


@on_a_loop
async def test_a_time_out_of_the_body_passes_through() -> None:
    with pytest.raises(TimeoutError):
        async with make().take("a"):
            raise TimeoutError


@on_a_loop
async def test_one_that_makes_way_ends_though_its_caller_comes_back_in_that_moment() -> None:
    taken = make(together=1)
    answer = asyncio.get_running_loop().create_future()

    async def transfer() -> None:
        async with taken.take("a") as place:
            place._stalled = NEVER
            await place.waits(answer)
            await asyncio.Event().wait()

    first = asyncio.create_task(transfer())
    await asyncio.sleep(0)
    answer.set_result(None)  # `first` runs before its end is told to it
    async with taken.take("b"):
        await asyncio.wait([first], timeout=PATIENCE)
        assert first.done()
        with pytest.raises(ResourceExhaustedError, match="made way"):
            await first
