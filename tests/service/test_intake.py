"""What waits for threads and workers: long texts in turn, and nothing for callers who have gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.store.registry import Registry
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import ModelShapes
from lorastack.sandbox.pool import Pool
from lorastack.sandbox.tasks import TEMPLATE
from lorastack.sandbox.wire import Job
from lorastack.service.calls import intake as intake_module
from lorastack.service.calls.call import Chat, Given, Text
from lorastack.service.calls.intake import Intake
from lorastack.service.calls.prepare import Preparer
from lorastack.service.calls.untrusted import Untrusted
from lorastack.text.grammar import Regex
from lorastack.text.tokenizer import Tokenizer
from tests.service.fakes import MAX_CONTEXT, served_model, store
from tests.service.test_prepare import CALL

PATIENCE = 30.0
NUM_THREADS = intake_module.NUM_LONG + intake_module.NUM_SHORT


class Slow:
    """Stands for tokenising: texts that begin with "wait" take until they are let go."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.let_go = threading.Event()

    def __call__(self, given: Any) -> tuple[int, ...]:
        self.running.append(given.text[:6])
        if given.text.startswith("wait"):
            assert self.let_go.wait(PATIENCE)
        return (len(given.text),)


class Bench:
    def __init__(self, registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> None:
        model = served_model(tokenizer, shapes)
        catalogue = Catalogue(model, registry, "")
        self.preparer = Preparer(model, catalogue)
        self.threads = ThreadPoolExecutor(NUM_THREADS)
        self.untrusted = Untrusted(tokenizer, self.preparer.grammars, model.max_text)
        self.intake = Intake(catalogue, self.preparer, self.untrusted, self.threads)
        self.slow = Slow()

    async def idle(self) -> None:
        while len(self.intake._long._free) < intake_module.NUM_LONG:
            await asyncio.sleep(0.001)


@pytest.fixture
def bench(
    tmp_path: Path,
    tokenizer: Tokenizer,
    shapes: ModelShapes,
    folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bench]:
    registry = Registry(tmp_path / "store")
    store(registry, "chatty", folders["chatty"], shapes)
    bench = Bench(registry, tokenizer, shapes)
    monkeypatch.setattr(intake_module, "LONG_TEXT", 100)
    yield bench
    bench.slow.let_go.set()
    bench.threads.shutdown()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


def test_long_texts_never_hold_all_threads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.preparer, "encode", bench.slow)
    long = "x" * 100

    async def check() -> None:
        encode = bench.intake.encode
        tasks = [asyncio.create_task(encode(Text(f"wait {i}{long}"), "", "a")) for i in range(5)]
        await asyncio.sleep(0)
        other = asyncio.create_task(encode(Text(f"other{long}"), "", "b"))
        # A short one gets a thread while the long ones have theirs and more of them wait.
        assert await encode(Text("short"), "", "c") == (5,)
        assert bench.slow.running.count("wait 2") == 0
        # Whoever gives up in the queue is never run; a thread that runs keeps its seat to the end.
        for task in (tasks[0], tasks[3], tasks[4]):
            task.cancel()
        await asyncio.wait([tasks[0], tasks[3], tasks[4]])
        assert len(bench.intake._long._free) == 0
        bench.slow.let_go.set()
        assert await other == (105,)
        assert await tasks[2] == (106,)
        await bench.idle()
        assert sorted(bench.slow.running) == ["other" + "x", "short", "wait 0", "wait 1", "wait 2"]

    run(check())


def test_many_short_texts_of_one_caller_leave_turns_to_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.preparer, "encode", bench.slow)

    async def check() -> None:
        encode = bench.intake.encode
        tasks = [asyncio.create_task(encode(Text(f"wait {i}"), "", "a")) for i in range(9)]
        await asyncio.sleep(0)
        other = asyncio.create_task(encode(Text("other"), "", "b"))
        await asyncio.sleep(0)
        bench.slow.let_go.set()
        await asyncio.gather(other, *tasks)

    run(check())
    # Behind what runs already, and one that was next, of however many wait.
    assert bench.slow.running.index("other") <= intake_module.NUM_SHORT + 1


def test_what_cannot_fit_takes_no_thread(bench: Bench, tokenizer: Tokenizer) -> None:
    most = MAX_CONTEXT * tokenizer.longest_token + 1024

    async def check() -> None:
        bench.threads.shutdown()
        for given in (
            Text("a" * (most + 1)),
            Chat((("user", "a" * most), ("user", "b"))),
            Chat((("user", ""),) * (MAX_CONTEXT + 1)),
        ):
            with pytest.raises(InvalidArgumentError, match=f"{most}|{MAX_CONTEXT + 1}") as refusal:
                await bench.intake.encode(given, "chatty", "a")
            assert refusal.value.reason is Reason.REQUEST_TOO_LARGE

    run(check())


def test_only_an_adapters_own_template_goes_to_a_worker(
    bench: Bench, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    async def work(pool: Pool, job: Job, caller: str) -> bytes:
        jobs.append(job)
        return b"HELLO"

    monkeypatch.setattr(Pool, "run", work)
    chat = Chat((("user", "hello"),))

    async def check() -> None:
        own = await bench.intake.encode(chat, "chatty", "a")
        models = await bench.intake.encode(chat, "", "a")
        assert tokenizer.decode(own) == "HELLO"
        assert models == tuple(tokenizer.chat(chat.messages))

    run(check())
    assert [job.task for job in jobs] == [TEMPLATE]


def test_a_kept_grammar_that_is_compiled_anew_counts_its_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evicted between the look-up and the compilation, or wanted behind another prompt."""
    grammars, wanted = bench.preparer.grammars, Regex("a+")
    grammars.compile(wanted, num_bytes=70)
    encode = bench.preparer.encode

    def evict(given: Given) -> tuple[int, ...]:
        grammars._kept.clear()
        return encode(given)

    monkeypatch.setattr(bench.preparer, "encode", evict)

    async def check() -> None:
        call = replace(CALL, response_format=wanted)
        prepared = await bench.intake.prepare(call, None, "a")
        assert grammars._sizes[prepared.request.grammar] == 70

    run(check())
