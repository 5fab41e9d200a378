"""From a call to the engine's Request without a thread that waits.

Programs that callers write run in worker processes, which are awaited. Texts are tokenised by
NUM_LONG + NUM_SHORT threads, round robin by caller, and long texts take NUM_LONG of them at most.
Whoever gives up leaves every queue.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.store.ids import NO_HEADS
from lorastack.sandbox.fair_queue import FairQueue
from lorastack.service.calls.call import Chat, GenerateCall, Given, Rendered, Text
from lorastack.service.calls.prepare import Prepared, Preparer
from lorastack.service.calls.untrusted import Untrusted
from lorastack.service.edge.threads import run_in

LONG_TEXT = 64 << 10  # bytes; a slow tokeniser takes a fifth of a second for them
MESSAGE_COST = 16  # bytes of text that take as long as an empty message of a chat
NUM_LONG, NUM_SHORT = 2, 2  # threads that take long and short texts
MAX_WAITING = 256  # calls with long texts; those with short ones are bounded as calls

T = TypeVar("T")


class Intake:
    """Prepares calls. Event loop only. workers: NUM_LONG + NUM_SHORT threads."""

    def __init__(
        self, catalogue: Catalogue, preparer: Preparer, untrusted: Untrusted, workers: Executor
    ) -> None:
        self._catalogue = catalogue
        self._preparer = preparer
        self._untrusted = untrusted
        self._workers = workers
        self._long = FairQueue(range(NUM_LONG), MAX_WAITING)
        self._short = FairQueue(range(NUM_SHORT), sys.maxsize)

    @property
    def num_waiting(self) -> int:
        """Calls with long texts that wait for a thread."""
        return self._long.num_waiting

    async def prepare(self, call: GenerateCall, deadline: float | None, caller: str) -> Prepared:
        """The request of a call. deadline: time.monotonic() seconds.

        caller: whoever waits is served round robin by it. Raises LorastackError.
        """
        self._check_length(call.input)
        lora_id = call.loras[0][0] if len(call.loras) == 1 else ""
        given = await self._rendered(call.input, lora_id, caller)
        wanted, grammar_bytes = call.response_format, 0
        is_long = _is_long(given)
        if wanted is not None:
            # Also of a kept one: it may go before `prepare` takes it, or another form be needed.
            kept_bytes = self._preparer.grammars.kept_bytes(wanted)
            if kept_bytes is None:
                kept_bytes = await self._untrusted.admit(wanted, caller)
                is_long = True
            grammar_bytes = kept_bytes

        def work() -> Prepared:
            return self._preparer.prepare(replace(call, input=given), deadline, grammar_bytes)

        return await self._run(work, is_long, caller)

    async def encode(self, given: Given, lora_id: str, caller: str) -> tuple[int, ...]:
        """The ids that the model would run. Raises LorastackError."""
        self._check_length(given)
        if lora_id:
            await run_in(self._workers, self._catalogue.resolve, ((lora_id, 1.0),), NO_HEADS)
        given = await self._rendered(given, lora_id, caller)
        return await self._run(lambda: self._preparer.encode(given), _is_long(given), caller)

    async def spans(self, prompt: str, caller: str) -> list[tuple[int, int]]:
        """The characters of each of a prompt's tokens. Raises LorastackError."""
        given = Text(prompt)
        self._check_length(given)
        return await self._run(lambda: self._preparer.spans(prompt), _is_long(given), caller)

    def _check_length(self, given: Given) -> None:
        """Refuses what is too long before anything is looked up, rendered or tokenised."""
        if isinstance(given, Chat):
            self._preparer.check_num_messages(len(given.messages))
        field = "prompt" if isinstance(given, Text) else "chat"
        self._preparer.check_length(_num_bytes(given), field)

    async def _rendered(self, given: Given, lora_id: str, caller: str) -> Given:
        """A chat as text, if a worker process renders it.

        One does if the single LoRA has a template, which wins over the model's, and for tools and
        other JSON: such values may keep even the model's own template busy for ever.
        """
        if not isinstance(given, Chat):
            return given
        template = None
        if lora_id:
            template = await run_in(self._workers, self._catalogue.own_template, lora_id)
        if template is None and given.is_plain:
            return given
        return Rendered(await self._untrusted.render(template, given, caller))

    async def _run(self, work: Callable[[], T], is_long: bool, caller: str) -> T:
        """Runs `work` in a thread; it keeps its seat until it ends, even if its caller has gone."""
        queue = self._long if is_long else self._short
        seat = await queue.take(caller)
        loop = asyncio.get_running_loop()

        def leave(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(queue.give, seat)

        working = self._workers.submit(work)
        working.add_done_callback(leave)
        return await asyncio.wrap_future(working)


def _is_long(given: Given) -> bool:
    """True if it takes a thread for long. A template takes a while for each message too."""
    num_messages = len(given.messages) if isinstance(given, Chat) else 0
    return _num_bytes(given) + num_messages * MESSAGE_COST > LONG_TEXT


def _num_bytes(given: Given) -> int:
    """Bytes of its text in UTF-8."""
    match given:
        case Text(text) | Rendered(text):
            return _length(text)
        case Chat(messages, fields, tools, variables):
            parts = chain(chain.from_iterable(messages), fields, (tools, variables))
            return sum(map(_length, parts))
    return 0


def _length(text: str) -> int:
    """Bytes in UTF-8; ASCII, which most texts are, is not encoded for that."""
    return len(text) if text.isascii() else len(text.encode())
