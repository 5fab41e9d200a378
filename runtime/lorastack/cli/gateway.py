"""`lorastack gateway`: HTTP for the clients of LoRAX, OpenAI and TGI, in a process of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from lorastack.cli.options import Host
from lorastack.client import DEFAULT_SERVER, check_server
from lorastack.config import GatewayConfig

_DEFAULTS = GatewayConfig()

HttpPort = Annotated[
    int | None,
    typer.Option(
        "--http-port",
        min=0,
        max=65535,
        metavar="N",
        envvar="LORASTACK_HTTP_PORT",
        help="Serve LoRAX, OpenAI and TGI clients over HTTP too; 0: any free port.",
        show_default="none",
    ),
]
AdapterManagement = Annotated[
    bool,
    typer.Option(
        "--adapter-management",
        envvar="LORASTACK_ADAPTER_MANAGEMENT",
        help="Let HTTP clients load and unload adapters, as vLLM's controllers do.",
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="ORIGIN",
        envvar="LORASTACK_CORS_ORIGIN",
        help="Let pages of this origin call over HTTP; *: any. May be repeated.",
    ),
]


def gateway(
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="HOST:PORT",
            envvar="LORASTACK_TARGET",
            help="The gRPC server.",
        ),
    ] = DEFAULT_SERVER,
    host: Host = _DEFAULTS.host,
    port: Annotated[
        int,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            metavar="N",
            envvar="LORASTACK_HTTP_PORT",
            help="0: any free one.",
        ),
    ] = _DEFAULTS.port,
    adapter_management: AdapterManagement = False,
    cors_origin: CorsOrigin = None,
) -> None:
    """Serve a gRPC server's adapters to HTTP clients of LoRAX, OpenAI and TGI."""
    check_server(target)
    config = GatewayConfig(
        target=target,
        host=host,
        port=port,
        adapter_management=adapter_management,
        cors_origins=tuple(cors_origin or ()),
    )
    # Deferred: other commands must not wait for it.
    from lorastack.gateway.serving import bind, serve
    from lorastack.service.edge.grpc_server import raise_file_limit

    def ready(address: str) -> None:
        typer.echo(f"lorastack gateway serves {target} on http://{address}")

    raise_file_limit()
    serve(config, bind(config), ready)
