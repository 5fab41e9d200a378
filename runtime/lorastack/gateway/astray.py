"""Replies to requests that no operation takes: unknown paths, wrong methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from lorastack.gateway.exchange import Operation, request_id

Handler = Callable[[Request, Exception], Awaitable[Response]]


async def no_path(request: Request, error: Exception) -> Response:
    """404. Whatever raised it."""
    return _refusal(request, 404, "NotFoundError", "no such path; GET /openapi.json lists all")


def no_method(operations: Sequence[Operation[Any]]) -> Handler:
    """405, with the methods that the path has."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        methods = {each.method for each in operations if compile_path(each.path)[0].match(path)}
        if "GET" in methods:
            methods.add("HEAD")
        allowed = ", ".join(sorted(methods))
        reply = _refusal(request, 405, "MethodNotAllowedError", f"this path takes {allowed}")
        reply.headers["allow"] = allowed
        return reply

    return refuse


def _refusal(request: Request, status: int, kind: str, message: str) -> Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    headers = {"x-request-id": request_id(request.headers)}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
