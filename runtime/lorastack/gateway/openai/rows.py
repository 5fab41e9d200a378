"""The rows of one request: run beside each other, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from lorastack.client import GenerateRequest, GenerateResponse, GenerateStreamResponse
from lorastack.gateway.selection import Selection, Selector

Part = tuple[int, GenerateStreamResponse]  # row, message


async def generate_rows(
    selector: Selector, selection: Selection, requests: Sequence[GenerateRequest]
) -> list[GenerateResponse]:
    """Every row's whole reply, in order. The first error ends all of them."""
    rows = [asyncio.create_task(selector.generate(each, selection)) for each in requests]
    try:
        return await asyncio.gather(*rows)
    finally:
        await _end(rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as they are made. parts: in the order of arrival; the first one is here."""

    parts: AsyncIterator[Part]
    close: Callable[[], Awaitable[object]]


async def open_rows(
    selector: Selector, selection: Selection, requests: Sequence[GenerateRequest]
) -> Rows:
    """Begins every row; raises the error of the first that says anything."""
    if len(requests) == 1:
        messages = await selector.stream(requests[0], selection)
        return Rows(_only(messages), messages.aclose)
    # One message of each row may wait here; a row that is not read is parked by the server.
    queue: asyncio.Queue[tuple[int, GenerateStreamResponse | Exception]]
    queue = asyncio.Queue(len(requests))

    async def pump(row: int) -> None:
        try:
            messages = await selector.stream(requests[row], selection)
            async with aclosing(messages):
                async for message in messages:
                    await queue.put((row, message))
        except Exception as error:
            await queue.put((row, error))

    pumps = [asyncio.create_task(pump(row)) for row in range(len(requests))]

    async def close() -> None:
        await _end(pumps)

    try:
        row, first = await queue.get()
        if isinstance(first, Exception):
            raise first
    except BaseException:
        await close()
        raise
    return Rows(_merged((row, first), queue, len(requests)), close)


async def _only(messages: AsyncIterator[GenerateStreamResponse]) -> AsyncIterator[Part]:
    async for message in messages:
        yield 0, message


async def _merged(
    first: Part, queue: asyncio.Queue[tuple[int, GenerateStreamResponse | Exception]], left: int
) -> AsyncIterator[Part]:
    row, message = first
    while True:
        yield row, message
        left -= message.HasField("final")
        if not left:
            return
        row, given = await queue.get()
        if isinstance(given, Exception):
            raise given
        message = given


async def _end(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
