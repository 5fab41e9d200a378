"""One HTTP request and its reply: the body read within its limits, the work ended with its caller.

An `Operation` is one row of the API's table: `app` makes routes of it, `describe` the OpenAPI
description.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lorastack.errors import InternalError, InvalidArgumentError, UnavailableError
from lorastack.errors import LorastackError as Failure
from lorastack.gateway.statuses import http_status, retry_after
from lorastack.gateway.traffic import Gone, Traffic

MAX_SHOWN = 3  # of a body's mistakes
# Reading a value takes far longer than a byte of text, and nobody else is served
# meanwhile; each unknown key is a mistake of its own. Token ids are values.
MAX_VALUES, MAX_KEYS = 1 << 18, 1 << 14
SMALL_BODY = 64 << 10  # bytes that are read without counting
OUR_BUG = "the gateway failed; its log says how"
STOPPING = "the gateway stops: send the request again, to another one or in a moment"
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # of JSON, or all behind a lone quote
_REQUEST_ID = re.compile(r"[!-~]{1,64}")  # printable ASCII: it goes into logs and headers

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks. request_id: the caller's X-Request-Id, else ours. path_params: as in the path."""

    request_id: str
    headers: Headers
    path_params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply. content: JSON of anything, or bytes as they are."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> tuple[bytes, str]:
        """The bytes and their content type."""
        if isinstance(self.content, bytes):
            return self.content, "text/plain; charset=utf-8"
        if isinstance(self.content, BaseModel):
            return self.content.model_dump_json().encode(), "application/json"
        return json.dumps(self.content, ensure_ascii=False).encode(), "application/json"


@dataclass(frozen=True, slots=True)
class Events:
    """A reply that is made while it is read: whole server-sent events, each ending in two newlines.

    Await the first message of the server before this is returned, so that a refusal gets its own
    HTTP status. What `parts` raises later is sent as an event by `failed`. close: ends what the
    parts are made of, even if none was asked for.
    """

    parts: AsyncGenerator[bytes]
    failed: Callable[[Failure], bytes]
    close: Callable[[], Awaitable[object]]
    headers: Mapping[str, str] = field(default_factory=dict)


Refuse = Callable[[Failure, int], Any]  # the JSON of an error and its HTTP status


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[Body]):
    """One method of one path.

    handle: gets the parsed body; for an operation without one, None. reply: the model of the JSON
    that it answers, for the description. invalid: the status of a body that does not parse.
    """

    method: str
    path: str
    summary: str
    handle: Callable[[Call, Body], Awaitable[Reply | Events]]
    refuse: Refuse
    body: type[Body] | None = None
    reply: type[BaseModel] | None = None
    streams: bool = False
    status_of: Callable[[Failure], int] = http_status


def parsed(model: type[Body], raw: bytes | bytearray) -> Body:
    """A body as its model. Raises InvalidArgumentError naming the fields that are wrong."""
    _check_values(raw)
    try:
        body = model.model_validate_json(raw)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        shown = "; ".join(_mistake(mistake) for mistake in mistakes[:MAX_SHOWN])
        path = [str(part) for part in mistakes[0]["loc"]]
        raise InvalidArgumentError(shown, field=".".join(path)[:200]) from None
    # pydantic takes the last of two equal names, and NaN; the caller meant one or neither.
    try:
        json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"the body: {str(error)[:200]}", field="body") from None
    return body


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name[:100]!r} stands twice in one object; leave one out")
        seen.add(name)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _check_values(raw: bytes | bytearray) -> None:
    if len(raw) <= SMALL_BODY:
        return
    structure = _STRING.sub(b"", raw)
    if structure.count(b",") > MAX_VALUES or structure.count(b":") > MAX_KEYS:
        raise InvalidArgumentError(
            f"the body holds more than {MAX_VALUES} values or {MAX_KEYS} keys; send fewer, or a "
            "text instead of token ids",
            field="body",
        )


def _mistake(mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"])[:200]
    if mistake["type"] == "extra_forbidden":
        return f"{where}: not known here; leave it out"
    says = mistake["msg"].removeprefix("Value error, ")
    return f"{where}: {says}" if where else f"the body: {says}"


class Exchange:
    """An operation as an ASGI application."""

    def __init__(self, operation: Operation[Any], traffic: Traffic) -> None:
        self._operation = operation
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        call = Call(request_id(headers), headers, scope.get("path_params", {}))
        try:
            body = await self._traffic.read(headers, receive, self._parse)
        except Failure as error:
            await self._refuse(call, error, send)
            return
        except Gone:
            return
        working = asyncio.create_task(self._work(call, body, send))
        self._traffic.add(working)
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            working.cancel()  # no effect on what is done
            await asyncio.wait((working, leaving))
        if not working.cancelled():
            working.result()

    def _parse(self, raw: bytearray) -> BaseModel | None:
        model = self._operation.body
        return None if model is None else parsed(model, raw)

    async def _work(self, call: Call, body: BaseModel | None, send: Send) -> None:
        try:
            reply = await self._operation.handle(call, body)
        except Failure as error:
            await self._refuse(call, error, send)
            return
        except asyncio.CancelledError:
            if not self._traffic.stopping:
                raise
            await self._refuse(call, UnavailableError(STOPPING), send)
            return
        except Exception:
            logger.exception("request %s failed", call.request_id)
            await self._refuse(call, InternalError(OUR_BUG), send)
            return
        if isinstance(reply, Reply):
            await send_whole(call, reply, send)
        else:
            await self._send_events(call, reply, send)

    async def _send_events(self, call: Call, events: Events, send: Send) -> None:
        head = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        failure: Failure | None = None
        try:
            await send_head(200, {**head, "x-request-id": call.request_id, **events.headers}, send)
            async for part in events.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except Failure as error:
            failure = error
        except asyncio.CancelledError:
            if not self._traffic.stopping:
                raise
            failure = UnavailableError(STOPPING)
        except OSError:
            return  # the caller has gone
        except Exception:
            logger.exception("request %s failed", call.request_id)
            failure = InternalError(OUR_BUG)
        finally:
            await events.parts.aclose()
            await events.close()
        last = b"" if failure is None else events.failed(failure)
        await send({"type": "http.response.body", "body": last})

    async def _refuse(self, call: Call, error: Failure, send: Send) -> None:
        status = self._operation.status_of(error)
        content = self._operation.refuse(error, status)
        headers = {}
        if status == 429:
            headers["retry-after"] = str(retry_after(error))
        await send_whole(call, Reply(content, status, headers), send)


def event(content: str) -> bytes:
    """One server-sent event of one line of data."""
    return f"data: {content}\n\n".encode()


async def _left(receive: Receive) -> None:
    """Returns when the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_whole(call: Call, reply: Reply, send: Send) -> None:
    """Sends a reply with the request's id."""
    body, content_type = reply.body()
    head = {"content-type": content_type, "content-length": str(len(body))}
    await send_head(reply.status, {**head, "x-request-id": call.request_id, **reply.headers}, send)
    await send({"type": "http.response.body", "body": body})


async def send_head(status: int, headers: Mapping[str, str], send: Send) -> None:
    """Begins a reply."""
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


def request_id(headers: Headers) -> str:
    """The caller's, if the server would take it, else a new one."""
    given = headers.get("x-request-id", "")
    if _REQUEST_ID.fullmatch(given):
        return given
    return f"req-{secrets.token_hex(12)}"
