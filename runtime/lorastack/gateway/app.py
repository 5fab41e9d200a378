"""The gateway's ASGI application: every API's operations as routes around one gRPC client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lorastack.client import AsyncClient
from lorastack.config import GatewayConfig
from lorastack.gateway import health, openai
from lorastack.gateway.describe import description
from lorastack.gateway.exchange import Exchange, Operation
from lorastack.gateway.selection import Selector
from lorastack.gateway.upstream import Upstream


def make_app(config: GatewayConfig) -> Starlette:
    """The application; its client connects when the application starts."""
    upstream = Upstream(config.target)
    selector = Selector(upstream)
    operations = all_operations(config, upstream, selector)
    routes = [
        Route(operation.path, Exchange(operation, config.max_body), methods=[operation.method])
        for operation in operations
    ]
    described = JSONResponse(description(operations))

    async def describe(request: Request) -> JSONResponse:
        return described

    routes.append(Route("/openapi.json", describe, methods=["GET"]))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncClient(config.target) as client:
            upstream.attach(client)
            yield

    return Starlette(routes=routes, middleware=_middleware(config), lifespan=lifespan)


def all_operations(
    config: GatewayConfig, upstream: Upstream, selector: Selector
) -> Sequence[Operation[Any]]:
    """What is served, by API."""
    del config
    return [
        *health.operations(upstream),
        *openai.operations(upstream, selector),
    ]


def _middleware(config: GatewayConfig) -> list[Middleware]:
    if not config.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
        )
    ]
