"""From the one name that foreign clients know to LoRAs and heads; hub adapters come on demand."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorastack.client import (
    GenerateRequest,
    GenerateResponse,
    GenerateStreamResponse,
    LoraRef,
)
from lorastack.errors import InvalidArgumentError, NotFoundError, Reason
from lorastack.gateway.upstream import Upstream

MAX_REMEMBERED = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request runs with. name: a LoRA, heads, a bundle or an alias; "": the base.

    loras: a stack (id, scale), instead of a name. medusa_id: as in GenerateRequest. pull: `name`
    is fetched from the hub if the store lacks it, with `token` and `revision`.
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
        self._pulls: dict[str, asyncio.Task[object]] = {}

    async def generate(self, request: GenerateRequest, selection: Selection) -> GenerateResponse:
        """The whole reply."""

        async def run() -> GenerateResponse:
            return await self._upstream.client.generate(request)

        return await self._run(request, selection, run)

    async def stream(
        self, request: GenerateRequest, selection: Selection
    ) -> AsyncIterator[GenerateStreamResponse]:
        """The reply as it is made. The first message is here when this returns.

        Closing the iterator cancels the row.
        """

        async def run() -> AsyncIterator[GenerateStreamResponse]:
            parts = self._upstream.client.stream(request)
            return _Begun(await anext(parts), parts)

        return await self._run(request, selection, run)

    async def _run(
        self, request: GenerateRequest, selection: Selection, run: Callable[[], Awaitable[T]]
    ) -> T:
        """Fills the request's adapters and runs it; again as heads, or after a pull, if it must."""
        name = selection.name
        if selection.loras:
            request.loras.extend(LoraRef(lora_id=i, scale=scale) for i, scale in selection.loras)
        as_heads = name in self._heads and not selection.medusa_id
        pulled = False
        for _ in range(4):  # as the other kind, pulled, and once more as the other kind
            request.lora_id = "" if as_heads else name
            request.medusa_id = name if as_heads else selection.medusa_id
            try:
                reply = await run()
            except InvalidArgumentError as error:
                if error.reason is not Reason.WRONG_ADAPTER_KIND or not name:
                    raise
                if selection.medusa_id or error.metadata.get("adapter_id", name) != name:
                    raise
                self._remember(name, not as_heads)
                as_heads = not as_heads
                continue
            except NotFoundError as error:
                missing = error.metadata.get("adapter_id", "")
                if pulled or not selection.pull or missing != name:
                    raise
                await self._pull(name, selection.token)
                pulled = True
                continue
            return reply
        raise InvalidArgumentError(f"{name} changes its kind while it is asked for; try again")

    def _remember(self, name: str, heads: bool) -> None:
        self._heads.pop(name, None)
        if heads:
            self._heads[name] = None
            if len(self._heads) > MAX_REMEMBERED:
                self._heads.popitem(last=False)

    async def _pull(self, name: str, token: str) -> None:
        """Fetches an adapter once, however many ask; whoever leaves does not end it."""
        hub_id, _, revision = name.partition("@")
        pull = self._pulls.get(name)
        if pull is None:
            pull = asyncio.create_task(
                self._upstream.client.pull(
                    name, hub_id=hub_id, revision=revision, token=token, if_digest=""
                )
            )
            self._pulls[name] = pull
            pull.add_done_callback(lambda done: self._pulled(name, done))
        await asyncio.shield(pull)

    def _pulled(self, name: str, pull: asyncio.Task[object]) -> None:
        del self._pulls[name]
        if not pull.cancelled():
            pull.exception()  # read, as its callers may have gone


class _Begun:
    """A stream whose first message is here. Closing it, read or not, closes what it reads."""

    def __init__(
        self, first: GenerateStreamResponse, parts: AsyncIterator[GenerateStreamResponse]
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
        await self._parts.aclose()  # type: ignore[attr-defined]
