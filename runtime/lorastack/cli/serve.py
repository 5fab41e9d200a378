"""`lorastack serve`: flags to ServerConfig, then the server until a signal ends it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.choices import Backend, Device, DType, LogFormat, LogLevel
from lorastack.cli.gateway import AdapterManagement, CorsOrigin, HttpPort
from lorastack.cli.options import (
    INT32,
    BackendOption,
    BaseName,
    DeviceOption,
    DTypeOption,
    Host,
    Isa,
    KvMemory,
    MaxContext,
    MaxRows,
    Model,
    QuantizeOption,
    Store,
    Threads,
    default_store,
    size,
)
from lorastack.cli.output import startup_bars, startup_log
from lorastack.config import (
    AdapterConfig,
    EngineConfig,
    GatewayConfig,
    ModelConfig,
    ServerConfig,
    ServiceConfig,
    parse_size,
    share_cores,
)

_ENGINE, _SERVICE, _ADAPTERS = EngineConfig(), ServiceConfig(), AdapterConfig(store=Path())
MOST_SHARDS = 64
LONGEST_WAIT = 86_400  # seconds


def _roots(folders: list[Path] | None) -> list[Path] | None:
    """Option callback: refuses "", which would open the server's current folder to clients."""
    if Path() in (folders or ()):
        raise typer.BadParameter("it is empty, or the current folder; write the folder's path")
    return folders


def serve(
    model: Model = None,
    store: Store = None,
    medusa: Annotated[
        str,
        typer.Option(
            "--medusa",
            metavar="ID",
            envvar="LORASTACK_MEDUSA",
            help="Default Medusa heads: an id, none, or what --pull-org lets the server pull.",
        ),
    ] = "",
    base_name: BaseName = None,
    pull_org: Annotated[
        list[str] | None,
        typer.Option(
            "--pull-org",
            metavar="ORG",
            envvar="LORASTACK_PULL_ORG",
            help="Let clients pull from this organisation of the hub. May be repeated.",
        ),
    ] = None,
    pull_root: Annotated[
        list[Path] | None,
        typer.Option(
            "--pull-root",
            metavar="DIR",
            envvar="LORASTACK_PULL_ROOT",
            exists=True,
            file_okay=False,
            callback=_roots,
            help="Let clients pull from folders under this one. May be repeated.",
        ),
    ] = None,
    read_only_store: Annotated[
        bool,
        typer.Option(
            "--read-only-store",
            envvar="LORASTACK_READ_ONLY_STORE",
            help="Serve a store that another server writes, or that cannot be written.",
        ),
    ] = False,
    keep_revisions: Annotated[
        int,
        typer.Option(
            "--keep-revisions",
            min=1,
            max=INT32,
            metavar="N",
            envvar="LORASTACK_KEEP_REVISIONS",
            help="Revisions to keep of each adapter; what is in use stays beside them.",
        ),
    ] = _ADAPTERS.keep_revisions,
    max_staged: Annotated[
        str,
        typer.Option(
            "--max-staged",
            metavar="SIZE",
            callback=size,
            envvar="LORASTACK_MAX_STAGED",
            help="Disk for all unfinished uploads together.",
        ),
    ] = "8GiB",
    transfer_idle: Annotated[
        float,
        typer.Option(
            "--transfer-idle",
            metavar="SECONDS",
            min=1,
            max=LONGEST_WAIT,
            envvar="LORASTACK_TRANSFER_IDLE",
            help="How long an upload or a download may wait for its caller.",
        ),
    ] = _ADAPTERS.transfer_idle,
    host: Host = _SERVICE.host,
    port: Annotated[
        int,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            metavar="N",
            envvar="LORASTACK_PORT",
            help="0: any free one.",
        ),
    ] = _SERVICE.port,
    metrics_port: Annotated[
        int,
        typer.Option(
            "--metrics-port",
            min=0,
            max=65535,
            metavar="N",
            envvar="LORASTACK_METRICS_PORT",
            help="Prometheus metrics over HTTP; 0: none.",
        ),
    ] = _SERVICE.metrics_port,
    http_port: HttpPort = None,
    adapter_management: AdapterManagement = False,
    cors_origin: CorsOrigin = None,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    backend: BackendOption = Backend.AUTO,
    isa: Isa = None,
    quantize: QuantizeOption = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel",
            min=1,
            max=MOST_SHARDS,
            metavar="N",
            envvar="LORASTACK_TENSOR_PARALLEL",
            help="Devices that share the base model, each with a process; on a CPU, processes.",
        ),
    ] = 1,
    threads: Threads = None,
    device_adapter_memory: Annotated[
        str | None,
        typer.Option(
            "--device-adapter-memory",
            metavar="SIZE",
            callback=size,
            envvar="LORASTACK_DEVICE_ADAPTER_MEMORY",
            help="Device memory for adapters, beside the model.",
            show_default="2GiB; on a GPU 8GiB, at most a tenth of it",
        ),
    ] = None,
    host_adapter_memory: Annotated[
        str,
        typer.Option(
            "--host-adapter-memory",
            metavar="SIZE",
            callback=size,
            envvar="LORASTACK_HOST_ADAPTER_MEMORY",
            help="Host memory for adapters that are kept ready.",
        ),
    ] = "8GiB",
    kv_memory: KvMemory = None,
    max_rows: MaxRows = None,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue",
            min=1,
            max=INT32,
            metavar="N",
            envvar="LORASTACK_MAX_QUEUE",
            help="Waiting requests.",
        ),
    ] = _ENGINE.max_queue,
    max_parked: Annotated[
        int,
        typer.Option(
            "--max-parked",
            min=1,
            max=INT32,
            metavar="N",
            envvar="LORASTACK_MAX_PARKED",
            help="Replies that wait for readers who do not read.",
        ),
    ] = _ENGINE.max_parked,
    reader_timeout: Annotated[
        int,
        typer.Option(
            "--reader-timeout",
            min=1,
            max=LONGEST_WAIT,
            metavar="SECONDS",
            envvar="LORASTACK_READER_TIMEOUT",
            help="How long a reader may take nothing.",
        ),
    ] = int(_ENGINE.reader_timeout),
    max_context: MaxContext = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            min=0,
            max=LONGEST_WAIT,
            metavar="SECONDS",
            envvar="LORASTACK_DRAIN_TIMEOUT",
            help="Seconds that running requests get on SIGTERM.",
        ),
    ] = _SERVICE.drain_timeout,
    log_format: Annotated[
        LogFormat,
        typer.Option("--log-format", envvar="LORASTACK_LOG_FORMAT", help=LogFormat.__doc__),
    ] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", envvar="LORASTACK_LOG_LEVEL", help=LogLevel.__doc__)
    ] = LogLevel.INFO,
) -> None:
    """Serve a base model with its adapters over gRPC."""
    share_cores()
    bars = sys.stderr.isatty() and log_format is LogFormat.TEXT
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
    # Deferred: `--help` and the client commands must not wait for torch.
    from lorastack.service.build import build_server
    from lorastack.service.watch.logs import configure_logging
    from lorastack.startup.device import device_defaults, find_device

    defaults = device_defaults(find_device(device.value))
    config = ServerConfig(
        model=ModelConfig(
            model=model,
            device=device.value,
            dtype=dtype.value,
            backend=backend.value,
            isa=isa,
            quantize=None if quantize is None else quantize.value,
            tensor_parallel=tensor_parallel,
            threads=threads,
            max_context=max_context,
        ),
        engine=EngineConfig(
            kv_memory=None if kv_memory is None else parse_size(kv_memory),
            max_rows=defaults.max_rows if max_rows is None else max_rows,
            max_queue=max_queue,
            max_parked=max_parked,
            reader_timeout=reader_timeout,
        ),
        adapters=AdapterConfig(
            store=default_store() if store is None else store,
            device_memory=defaults.adapter_memory
            if device_adapter_memory is None
            else parse_size(device_adapter_memory),
            host_memory=parse_size(host_adapter_memory),
            max_staged=parse_size(max_staged),
            transfer_idle=transfer_idle,
            keep_revisions=keep_revisions,
            default_medusa=medusa,
            read_only_store=read_only_store,
            base_names=tuple(base_name or ()),
            pull_orgs=tuple(pull_org or ()),
            pull_roots=tuple(pull_root or ()),
        ),
        service=ServiceConfig(
            host=host,
            port=port,
            drain_timeout=drain_timeout,
            log_format=log_format.value,
            log_level=log_level.value,
            metrics_port=metrics_port,
            http=None
            if http_port is None
            else GatewayConfig(
                host=host,
                port=http_port,
                adapter_management=adapter_management,
                cors_origins=tuple(cors_origin or ()),
            ),
        ),
    )
    configure_logging(config.service.log_format, config.service.log_level)
    with startup_bars() if bars else nullcontext(startup_log()) as progress:
        server = build_server(config, progress)
    raise typer.Exit(server.run(typer.echo))
