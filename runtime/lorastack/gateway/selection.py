"""From the one name that foreign clients know to LoRAs and heads; hub adapters come on demand."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from lorastack.client import (
    GenerateRequest,
    GenerateResponse,
    GenerateStreamResponse,
    LoraRef,
    MajoritySign,
    Strategy,
)
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
)
from lorastack.gateway.upstream import Upstream

MAX_REMEMBERED = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request runs with. name: a LoRA, heads, a bundle or an alias; "": the base.

    loras: a stack (id, scale), instead of a name. medusa_id: as in GenerateRequest. pull: what the
    store lacks of them is fetched from the hub, with `token`, if its name may be a hub id.
    """

    name: str = ""
    loras: Sequence[tuple[str, float]] = ()
    medusa_id: str = ""
    pull: bool = False
    token: str = ""


class Selector:
    """Runs requests with their adapters. For one event loop."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        # Names that turned out to be heads: asked for as such at once the next time.
        self._heads: OrderedDict[str, None] = OrderedDict()
        self._pulls: dict[tuple[str, str], asyncio.Task[object]] = {}  # by name and token

    async def generate(self, request: GenerateRequest, selection: Selection) -> GenerateResponse:
        """The whole reply."""

        async def run() -> GenerateResponse:
            return await self._upstream.client.generate(request)

        return await self._run(request, selection, run)

    async def stream(self, request: GenerateRequest, selection: Selection) -> Stream:
        """The reply as it is made. The first message is here when this returns.

        Closing the iterator cancels the row.
        """

        async def run() -> Stream:
            parts = self._upstream.client.stream(request)
            return Stream(await anext(parts), parts)

        return await self._run(request, selection, run)

    async def merged(
        self, selection: Selection, strategy: Strategy, density: float, majority_sign: MajoritySign
    ) -> Selection:
        """The selection with its stack merged into one adapter: by the server, once."""
        loras = [LoraRef(lora_id=lora_id, scale=scale) for lora_id, scale in selection.loras]
        pulls: set[str] = set()
        while True:
            try:
                merged = await self._upstream.client.merge(
                    loras, strategy, density, majority_sign=majority_sign
                )
            except NotFoundError as error:
                await self._fetch(error, selection, pulls)
            else:
                return Selection(loras=[(merged.id, 1.0)], medusa_id=selection.medusa_id)

    async def _run(
        self, request: GenerateRequest, selection: Selection, run: Callable[[], Awaitable[T]]
    ) -> T:
        """Fills the request's adapters and runs it; again as heads, or after a pull, if it must."""
        name = selection.name
        if selection.loras:
            request.loras.extend(LoraRef(lora_id=i, scale=scale) for i, scale in selection.loras)
        as_heads = name in self._heads and not selection.medusa_id
        pulls: set[str] = set()
        turns = 0  # from LoRA to heads or back: once, and once more after a pull
        while True:
            request.lora_id = "" if as_heads else name
            request.medusa_id = name if as_heads else selection.medusa_id
            try:
                return await run()
            except InvalidArgumentError as error:
                if error.reason is not Reason.WRONG_ADAPTER_KIND or not name or turns == 2:
                    raise
                if selection.medusa_id or error.metadata.get("adapter_id", name) != name:
                    raise
                turns += 1
                as_heads = not as_heads
                self._remember(name, as_heads)
            except NotFoundError as error:
                await self._fetch(error, selection, pulls)

    async def _fetch(self, error: NotFoundError, selection: Selection, done: set[str]) -> None:
        """Pulls what the error misses, or raises it. done: what this request has pulled."""
        missing = error.metadata.get("adapter_id", "")
        wanted = {selection.name, selection.medusa_id, *(name for name, _ in selection.loras)}
        may = selection.pull and "/" in missing and missing in wanted
        if not may or missing in done:
            raise error
        done.add(missing)
        try:
            await self._pull(missing, selection.token)
        except PermissionDeniedError as refused:
            raise NotFoundError(
                f"{error.message}, and it cannot be pulled: {refused.message}", adapter_id=missing
            ) from None

    def _remember(self, name: str, heads: bool) -> None:
        self._heads.pop(name, None)
        if heads:
            self._heads[name] = None
            if len(self._heads) > MAX_REMEMBERED:
                self._heads.popitem(last=False)

    async def _pull(self, name: str, token: str) -> None:
        """Fetches an adapter once, however many ask; whoever leaves does not end it.

        Callers with different tokens do not wait for each other: one may see what the other cannot.
        """
        key = (name, token)
        pull = self._pulls.get(key)
        if pull is None:
            pull = asyncio.create_task(
                self._upstream.client.pull(name, hub_id=name, token=token, if_digest="")
            )
            self._pulls[key] = pull
            pull.add_done_callback(lambda done: self._pulled(key, done))
        # Stored by somebody else meanwhile? If not, it is missing once more.
        with suppress(AlreadyExistsError, AbortedError):
            await asyncio.shield(pull)

    def _pulled(self, key: tuple[str, str], pull: asyncio.Task[object]) -> None:
        del self._pulls[key]
        if not pull.cancelled():
            pull.exception()  # read, as its callers may have gone


class Stream:
    """A stream whose first message is here. Closing it, read or not, closes what it reads."""

    def __init__(
        self, first: GenerateStreamResponse, parts: AsyncGenerator[GenerateStreamResponse]
    ) -> None:
        self._first: GenerateStreamResponse | None = first
        self._parts = parts

    def __aiter__(self) -> AsyncIterator[GenerateStreamResponse]:
        return self

    async def __anext__(self) -> GenerateStreamResponse:
        if self._first is None:
            return await anext(self._parts)
        first, self._first = self._first, None
        return first

    async def aclose(self) -> None:
        self._first = None
        await self._parts.aclose()
