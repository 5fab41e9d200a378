"""POST /, /generate and /generate_stream."""

from __future__ import annotations

from typing import Any

from lorastack.client import GenerateRequest, TokenizeRequest
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.exchange import Call, Events, Operation, Reply
from lorastack.gateway.lorax.bodies import Body, Generated, Parameters
from lorastack.gateway.lorax.refusals import failed, refuse, status_of
from lorastack.gateway.lorax.replies import headers, whole
from lorastack.gateway.lorax.requests import merge_of, request_of, selection_of
from lorastack.gateway.lorax.stream import events
from lorastack.gateway.selection import Selection, Selector
from lorastack.gateway.upstream import Upstream, row_id


def operations(upstream: Upstream, selector: Selector) -> list[Operation[Any]]:
    """The routes that generate."""
    routes = _Routes(upstream, selector)
    return [
        Operation(
            method="POST",
            path="/",
            summary="Generate: a list of one reply, or server-sent events with stream",
            handle=routes.either,
            refuse=refuse,
            body=Body,
            reply=Generated,
            streams=True,
            status_of=status_of,
        ),
        Operation(
            method="POST",
            path="/generate",
            summary="Generate: one reply",
            handle=routes.whole,
            refuse=refuse,
            body=Body,
            reply=Generated,
            status_of=status_of,
        ),
        Operation(
            method="POST",
            path="/generate_stream",
            summary="Generate: server-sent events, one a token",
            handle=routes.stream,
            refuse=refuse,
            body=Body,
            streams=True,
            status_of=status_of,
        ),
    ]


class _Routes:
    def __init__(self, upstream: Upstream, selector: Selector) -> None:
        self._upstream = upstream
        self._selector = selector

    async def either(self, call: Call, body: Body) -> Reply | Events:
        if body.stream:
            return await self.stream(call, body)
        reply = await self._generate(call, body)
        return Reply([reply.content], headers=reply.headers)

    async def whole(self, call: Call, body: Body) -> Reply:
        if body.stream:
            raise InvalidArgumentError("stream: use /generate_stream for streams", field="stream")
        return await self._generate(call, body)

    async def stream(self, call: Call, body: Body) -> Events:
        request, selection = await self._prepared(call, body, streams=True)
        info = await self._upstream.info()
        parts = await self._selector.stream(request, selection)
        return Events(events(body, parts, info.limits.max_context), failed, parts.aclose)

    async def _generate(self, call: Call, body: Body) -> Reply:
        request, selection = await self._prepared(call, body, streams=False)
        reply = await self._selector.generate(request, selection)
        return Reply(whole(body, reply), headers=headers(reply))

    async def _prepared(
        self, call: Call, body: Body, *, streams: bool
    ) -> tuple[GenerateRequest, Selection]:
        given = body.parameters or Parameters()
        request = request_of(body, streams=streams)
        request.request_id = row_id(call.request_id)
        selection = selection_of(given)
        if (merge := merge_of(given)) is not None:
            selection = await self._selector.merged(
                selection, merge.strategy, merge.density, merge.majority_sign
            )
        if given.truncate is not None:
            await self._truncate(request, given.truncate)
        return request, selection

    async def _truncate(self, request: GenerateRequest, longest: int) -> None:
        """Keeps the last tokens of the prompt, as LoRAX and TGI do."""
        ids = await self._upstream.client.tokenize(TokenizeRequest(prompt=request.prompt))
        if len(ids) > longest:
            request.token_ids.ids.extend(ids[-longest:])
