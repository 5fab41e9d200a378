"""Requests at a server, from a process of their own at the lowest priority.

Time to first token is the server's own (from its queue to the first token), so that a starved
client does not count; gaps between tokens are seen here.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import grpc

from lorastack.client.traffic import percentile
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1.generation_pb2_grpc import GenerationServiceStub

T = TypeVar("T")
VOCABULARY = 49152


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request. at: seconds after the start; None: as soon as a slot is free."""

    lora_id: str
    max_new_tokens: int
    prompt_tokens: int = 32
    at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Seconds. gaps: between messages with tokens, the first one's wait left out."""

    lora_id: str
    ended: float  # after the start
    first_token: float
    adapter_wait: float
    tokens: int
    gaps: tuple[float, ...]


class Background:
    """Runs functions in one process of its own."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, function: Callable[..., T], *args: Any) -> T:
        return self._pool.submit(function, *args).result()

    def start(self, function: Callable[..., T], *args: Any) -> Callable[[], T]:
        """Call what is returned to wait for the result."""
        return self._pool.submit(function, *args).result


@contextmanager
def background(niceness: int = 19) -> Iterator[Background]:
    """niceness: 19 leaves the processors to the server, 0 sees messages when they come."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=os.nice, initargs=(niceness,)) as pool:
        yield Background(pool)


def send(address: str, calls: list[Call], slots: int) -> list[Outcome]:
    """All calls, at most `slots` at a time; outcomes in the order of their ends."""
    return asyncio.run(_send(address, calls, slots))


def first_token_ms(outcomes: list[Outcome]) -> dict[str, float]:
    waits = [1000 * outcome.first_token for outcome in outcomes]
    return {"median": round(statistics.median(waits), 1), "p99": round(percentile(waits, 0.99), 1)}


async def _send(address: str, calls: list[Call], slots: int) -> list[Outcome]:
    free = asyncio.Semaphore(slots)
    outcomes: list[Outcome] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        start = time.monotonic()

        async def one(index: int, call: Call) -> None:
            if call.at is not None:
                await asyncio.sleep(start + call.at - time.monotonic())
            async with free:
                outcomes.append(await _stream(stub, index, call, start))

        await asyncio.gather(*(one(index, call) for index, call in enumerate(calls)))
    return outcomes


async def _stream(stub: Any, index: int, call: Call, start: float) -> Outcome:
    rng = random.Random(index)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[rng.randrange(VOCABULARY) for _ in range(call.prompt_tokens)]),
        lora_id=call.lora_id,
        medusa_id="none",
        stop=pb.StopParams(max_new_tokens=call.max_new_tokens, ignore_eos=True),
    )
    times: list[float] = []
    final = pb.GenerateResponse()
    async for part in stub.GenerateStream(request):
        if part.token_ids:
            times.append(time.monotonic())
        if part.HasField("final"):
            final = part.final
    return Outcome(
        lora_id=call.lora_id,
        ended=time.monotonic() - start,
        first_token=final.timings.time_to_first_token_ms / 1000,
        adapter_wait=final.timings.adapter_wait_ms / 1000,
        tokens=final.usage.generated_tokens,
        gaps=tuple(after - before for before, after in pairwise(times)),
    )
