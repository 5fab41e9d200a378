"""One wake-up a step, bounded buffers, and rows that end when their readers leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lorastack.errors import InvalidArgumentError, Reason, ResourceExhaustedError
from lorastack.request import (
    Final,
    FinishReason,
    HeadsUse,
    LoraUse,
    Request,
    RowEvent,
    SamplingParams,
    SpeculationStats,
    StopParams,
    Timings,
)
from lorastack.service.calls import readers as readers_module
from lorastack.service.calls.dispatch import Dispatcher
from tests.helpers.live import PATIENCE

FINAL = Final(
    finish_reason=FinishReason.LENGTH,
    stop_match="",
    prompt_tokens=1,
    cached_prompt_tokens=0,
    generated_tokens=1,
    speculation=SpeculationStats(),
    timings=Timings(queue=0, adapter_wait=0, time_to_first_token=0, total=0),
)


class Recorder:
    """An engine that only writes down what it is asked."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.refusal = refusal

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(("submit", request.request_id))

    def cancel(self, request_id: str) -> None:
        self.calls.append(("cancel", request_id))

    def park(self, request_id: str) -> None:
        self.calls.append(("park", request_id))

    def resume(self, request_id: str) -> None:
        self.calls.append(("resume", request_id))


def request(request_id: str, **fields: Any) -> Request:
    stop = StopParams(max_new_tokens=4)
    return Request(
        request_id=request_id, prompt_ids=(1,), sampling=SamplingParams(), stop=stop, **fields
    )


def event(request_id: str, text: str = "a", *, last: bool = False) -> RowEvent:
    return RowEvent(request_id=request_id, text=text, final=FINAL if last else None)


async def settle() -> None:
    """Lets everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(
    test: Callable[[Dispatcher, Recorder], Coroutine[Any, Any, None]],
    engine: Recorder | None = None,
) -> None:
    async def main() -> None:
        recorder = engine or Recorder()
        dispatcher = Dispatcher(max_buffered=3, max_parked=2, reader_timeout=PATIENCE)
        dispatcher.attach(recorder, asyncio.get_running_loop())
        await test(dispatcher, recorder)
        assert dispatcher._streams == {}

    asyncio.run(main())


def count_wakes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one whenever a delivery wakes the running loop."""
    wakes: list[object] = []
    loop = asyncio.get_running_loop()
    real = loop.call_soon_threadsafe

    def counted(call: Any, *args: Any) -> Any:
        if getattr(call, "__name__", "") == "_route":
            wakes.append(args)
        return real(call, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    return wakes


def test_a_step_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        wakes = count_wakes(monkeypatch)
        async with dispatcher.open("a") as a, dispatcher.open("b") as b:
            a.submit(request("a"))
            b.submit(request("b"))
            step = [event("a", "1"), event("b", "2"), event("a", "3", last=True)]
            await asyncio.to_thread(dispatcher.deliver, [*step, event("b", last=True)])
            assert len(wakes) == 1
            assert [e.text for e in await a.take()] == ["1", "3"]
            assert [e.text for e in await b.take()] == ["2", "a"]

    run(test)


def test_whoever_wants_the_whole_is_woken_once_and_never_parks() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        async with dispatcher.open("a", whole=True) as stream:
            stream.submit(request("a"))
            reader = asyncio.ensure_future(stream.take())
            dispatcher.deliver([event("a", str(index)) for index in range(9)])
            await settle()
            assert not reader.done()
            dispatcher.deliver([event("a", "end", last=True)])
            assert [e.text for e in await reader] == [*map(str, range(9)), "end"]
        assert engine.calls == [("submit", "a")]

    run(test)


def test_steps_that_nobody_waits_for_do_not_wake_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        wakes = count_wakes(monkeypatch)
        async with dispatcher.open("a", whole=True) as whole, dispatcher.open("b") as parts:
            whole.submit(request("a"))
            parts.submit(request("b"))
            await asyncio.to_thread(dispatcher.deliver, [event("a", "1")])
            assert wakes == []
            await asyncio.to_thread(dispatcher.deliver, [event("a", "2"), event("b", "x")])
            assert [e.text for e in await parts.take()] == ["x"]
            await asyncio.to_thread(dispatcher.deliver, [event("a", "3", last=True)])
            assert [e.text for e in await whole.take()] == ["1", "2", "3"]
            assert len(wakes) == 2
            await asyncio.to_thread(dispatcher.deliver, [event("b", last=True)])
            await parts.take()

    run(test)


def test_a_slow_reader_parks_its_own_row_and_resumes_when_it_reads() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        async with dispatcher.open("slow") as slow, dispatcher.open("fast") as fast:
            slow.submit(request("slow"))
            fast.submit(request("fast"))
            engine.calls.clear()
            for _ in range(2):
                dispatcher.deliver([event("slow"), event("fast")])
                assert len(await fast.take()) == 1
            assert engine.calls == []
            dispatcher.deliver([event("slow")])
            await settle()
            assert engine.calls == [("park", "slow")]
            dispatcher.deliver([event("slow")])  # the step that was under way
            await settle()
            assert engine.calls == [("park", "slow")]
            assert len(await slow.take()) == 4
            assert engine.calls == [("park", "slow"), ("resume", "slow")]
            dispatcher.deliver([event("slow", last=True), event("fast", last=True)])
            await slow.take()

    run(test)


def test_leaving_early_cancels_and_later_events_are_dropped() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        async with dispatcher.open("a") as stream:
            stream.submit(request("a"))
            dispatcher.deliver([event("a")])
            await stream.take()
        assert engine.calls == [("submit", "a"), ("cancel", "a")]
        dispatcher.deliver([event("a")])
        dispatcher.deliver([event("a", last=True)])
        dispatcher.deliver([event("a")])
        await settle()

    run(test)


def test_a_finished_row_is_not_cancelled() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        async with dispatcher.open("a") as stream:
            stream.submit(request("a"))
            dispatcher.deliver([event("a", last=True)])
            await settle()
        assert engine.calls == [("submit", "a")]

    run(test)


def test_a_refused_row_leaves_nothing_behind() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        with pytest.raises(ResourceExhaustedError):
            async with dispatcher.open("a") as stream:
                stream.submit(request("a"))
        assert engine.calls == []

    run(test, Recorder(ResourceExhaustedError("full")))


def test_an_id_in_use_is_refused_from_the_moment_of_the_call() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        async with dispatcher.open("a"):
            with pytest.raises(InvalidArgumentError, match="request_id 'a'"):
                async with dispatcher.open("a"):
                    pytest.fail("opened twice")
        async with dispatcher.open("a"):
            pass

    run(test)


def test_a_retry_waits_for_the_row_whose_caller_has_gone() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        async with dispatcher.open("a") as first:
            first.submit(request("a"))
        texts: list[str] = []

        async def retry() -> None:
            async with dispatcher.open("a") as second:
                second.submit(request("a"))
                texts.extend(e.text for e in await second.take())

        task = asyncio.create_task(retry())
        await settle()
        assert engine.calls == [("submit", "a"), ("cancel", "a")]
        dispatcher.deliver([event("a", "old", last=True)])
        await settle()
        assert engine.calls[-1] == ("submit", "a")
        dispatcher.deliver([event("a", "new", last=True)])
        await task
        assert texts == ["new"]

    run(test)


def test_digests_in_use_are_counted_until_the_row_ends() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        lora = LoraUse(lora_id="l", digest="L")
        heads = HeadsUse(medusa_id="h", digest="H", shared_id="s", shared_digest="S")
        async with dispatcher.open("a") as a, dispatcher.open("b") as b:
            a.submit(request("a", loras=(lora,), heads=heads))
            b.submit(request("b", loras=(lora,)))
            assert dispatcher.digests_in_use() == {"L": 2, "H": 1, "S": 1}
            dispatcher.deliver([event("a", last=True)])
            await settle()
        assert dispatcher.digests_in_use() == {"L": 1}  # b is cancelled, but has not ended
        dispatcher.deliver([event("b", last=True)])
        await settle()
        assert dispatcher.digests_in_use() == {}

    run(test)


def test_events_after_the_loop_is_gone_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    dispatcher = Dispatcher(max_buffered=3, max_parked=2, reader_timeout=PATIENCE)
    dispatcher.attach(Recorder(), loop)
    loop.close()
    dispatcher.deliver([event("a")])
    dispatcher.fail(RuntimeError("x"))


class Reader:
    """Takes a part when it is told to."""

    def __init__(self) -> None:
        self.takes = asyncio.Event()

    async def write(self) -> None:
        await self.takes.wait()


async def hand_over(dispatcher: Dispatcher, name: str, reader: Reader) -> None:
    async with dispatcher.open(name) as stream:
        stream.submit(request(name))
        await stream.hand_over(reader.write())


def test_many_parts_may_go_out_at_once() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        readers = {str(number): Reader() for number in range(9)}
        calls = [
            asyncio.create_task(hand_over(dispatcher, name, reader))
            for name, reader in readers.items()
        ]
        await settle()
        dispatcher.deliver([event(name, last=True) for name in readers])
        for reader in readers.values():
            reader.takes.set()
        await asyncio.gather(*calls)
        assert not [call for call in engine.calls if call[0] == "cancel"]

    run(test)


def test_of_too_many_readers_that_take_nothing_the_longest_waiting_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its row is cancelled at once; its status comes when it takes what is under way to it."""
    monkeypatch.setattr(readers_module, "GRACE", 0.0)

    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        readers = {name: Reader() for name in "abcd"}
        calls = {}
        for name, reader in readers.items():
            calls[name] = asyncio.create_task(hand_over(dispatcher, name, reader))
            await settle()
        assert [call for call in engine.calls if call[0] == "cancel"] == [
            ("cancel", "a"),
            ("cancel", "b"),
        ]
        dispatcher.deliver([event("a"), event("a", last=True)])
        await settle()
        assert "a" not in dispatcher._streams  # the id is free, though the call is not over
        again = asyncio.create_task(hand_over(dispatcher, "a", Reader()))
        await settle()  # one more: now it is c that has waited longest
        assert engine.calls[-1] == ("cancel", "c")
        for name in "bc":
            dispatcher.deliver([event(name, last=True)])
        for reader in readers.values():
            reader.takes.set()
        for name in "abc":
            with pytest.raises(ResourceExhaustedError) as refusal:
                await calls[name]
            assert refusal.value.reason is Reason.READER_TOO_SLOW
        await calls["d"]  # it reads, in time
        again.cancel()
        await settle()
        dispatcher.deliver([event("a", last=True), event("d", last=True)])
        await settle()

    run(test)


def test_a_reader_that_takes_nothing_for_too_long_loses_its_row() -> None:
    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        dispatcher._waiting._patience = 0.0
        reader = Reader()
        call = asyncio.create_task(hand_over(dispatcher, "a", reader))
        while ("cancel", "a") not in engine.calls:
            await asyncio.sleep(0)
        dispatcher.deliver([event("a", last=True)])
        reader.takes.set()
        with pytest.raises(ResourceExhaustedError):
            await call

    run(test)


def test_what_waits_for_a_reader_that_takes_nothing_is_dropped() -> None:
    """Also where its row has ended already."""

    async def test(dispatcher: Dispatcher, engine: Recorder) -> None:
        reader = Reader()
        async with dispatcher.open("a") as stream:
            stream.submit(request("a"))
            writing = asyncio.create_task(stream.hand_over(reader.write()))
            await settle()
            dispatcher.deliver([event("a"), event("a", last=True)])
            await settle()
            dispatcher._give_up(stream)
            assert stream._buffer == [] and dispatcher._streams == {}
            reader.takes.set()
            with pytest.raises(ResourceExhaustedError):
                await writing
        assert ("cancel", "a") not in engine.calls

    run(test)
