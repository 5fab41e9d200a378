"""The gateway's ASGI application: every API's operations as routes around one gRPC client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from lorastack.client import AsyncClient
from lorastack.config import GatewayConfig
from lorastack.gateway import health, lorax, management, openai
from lorastack.gateway.astray import no_method, no_path
from lorastack.gateway.describe import description
from lorastack.gateway.exchange import Call, Exchange, Operation, Reply
from lorastack.gateway.selection import Selector
from lorastack.gateway.traffic import Traffic
from lorastack.gateway.upstream import Upstream


def make_app(config: GatewayConfig, scrape: health.Scrape | None = None) -> Starlette:
    """The application; its client connects when the application starts.

    scrape: see `health.operations`.
    Its `state.traffic` is what is open.
    """
    upstream = Upstream(config.target)
    selector = Selector(upstream)
    traffic = Traffic(config.max_body)
    operations = all_operations(config, upstream, selector, scrape)
    served = [*operations, _description(operations)]
    routes = [
        Route(operation.path, Exchange(operation, traffic), methods=[operation.method])
        for operation in served
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncClient(config.target) as client:
            upstream.attach(client)
            yield

    app = Starlette(
        routes=routes,
        middleware=_middleware(config),
        exception_handlers={404: no_path, 405: no_method(served)},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # its Location repeats whatever Host the caller sent
    app.state.traffic = traffic
    return app


def all_operations(
    config: GatewayConfig,
    upstream: Upstream,
    selector: Selector,
    scrape: health.Scrape | None,
) -> Sequence[Operation[Any]]:
    """What is served, by API."""
    return [
        *health.operations(upstream, scrape),
        *lorax.operations(upstream, selector),
        *openai.operations(upstream, selector),
        *(management.operations(upstream) if config.adapter_management else ()),
    ]


def _description(operations: Sequence[Operation[Any]]) -> Operation[Any]:
    described = Reply(description(operations))

    async def describe(call: Call, body: None) -> Reply:
        return described

    return Operation(
        method="GET",
        path="/openapi.json",
        summary="This description",
        handle=describe,
        refuse=health.refuse,
    )


def _middleware(config: GatewayConfig) -> list[Middleware]:
    if not config.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    ]
