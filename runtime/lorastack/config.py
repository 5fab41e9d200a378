"""Server configuration: frozen, keyword-only, composed. Built by the CLI, never mutated.

A constructor is given its own part, never the whole.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CPU_ROWS, CPU_ADAPTERS = 32, 2 * GIB  # where nobody says otherwise; see startup.device for GPUs
_UNITS = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SIZE = re.compile(r"(?P<number>[0-9]{1,20}(\.[0-9]{1,20})?)(?P<unit>[KMGT]iB|B|)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """model: folder or hub id; None: the embedded default. dtype: auto, or torch's name of a dtype.

    backend: auto, torch, native or triton. isa: the best instruction set that native kernels may
    use, such as avx2; None: the machine's. quantize: int8 or int4 for the base model's weights, or
    None. tensor_parallel: devices that share the model.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    isa: str | None = None
    quantize: str | None = None
    tensor_parallel: int = 1
    threads: int | None = None  # CPU threads of a step; None: as torch has it
    max_context: int | None = None  # tokens; None: the model's own


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the step loop."""

    kv_memory: int | None = None  # bytes; None: `most_kv` or what is left, on CUDA a share of that
    most_kv: int = 4 * GIB
    page_size: int = 16  # tokens
    max_rows: int = CPU_ROWS  # running at once
    max_queue: int = 256  # waiting
    # Tokens of a step: the last one of each row that decodes, then prompts (see engine.pace), then
    # nodes. Rows that decode always run, and one token of a prompt with them.
    max_step_tokens: int = 256
    max_nodes: int = 63  # drafted tokens of a row in a step at most; a request may say otherwise
    max_buffered_events: int = 64  # a slow reader's unread events before its row parks
    max_parked: int = 256  # replies that may wait for readers; then the one that waits longest ends
    reader_timeout: float = 60.0  # seconds for which a reader may take nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Where adapters live and what they may take. Sizes in bytes."""

    store: Path
    device_memory: int = CPU_ADAPTERS
    host_memory: int = 8 * GIB
    max_upload: int = 4 * GIB
    max_files: int = 64
    max_staged: int = 8 * GIB  # all unfinished uploads together
    transfer_idle: float = 60.0  # seconds that an upload or a download may wait for its caller
    keep_revisions: int = 16  # for each id
    max_merged: int = 64  # adapters that MergeAdapters made
    default_medusa: str = ""
    read_only_store: bool = False  # another process writes it, or nobody can
    base_names: tuple[str, ...] = ()  # what else adapters may call the base model
    pull_orgs: tuple[str, ...] = ()  # organisations of the hub that may be pulled from
    pull_roots: tuple[Path, ...] = ()  # folders that may be pulled from


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Where HTTP is served, and what it may ask for. target: the gRPC server, HOST:PORT."""

    target: str = "127.0.0.1:50051"
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    adapter_management: bool = False  # adapters may be loaded and unloaded over HTTP
    cors_origins: tuple[str, ...] = ()  # whose pages may call; "*": anyone's
    max_body: int = 8 * MIB  # of a request
    max_connections: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where the server listens and how it stops. Port 0: any free port."""

    host: str = "127.0.0.1"
    port: int = 50051
    drain_timeout: float = 30.0  # seconds
    log_format: str = "text"
    log_level: str = "info"  # debug, info, warning, error
    metrics_port: int = 0  # 0: no metrics endpoint
    http: GatewayConfig | None = None  # the gateway in the server's process; its target is ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All that the CLI decides about one server."""

    adapters: AdapterConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)


def cache_dir() -> Path:
    """The user's cache folder for lorastack: LORASTACK_CACHE, else XDG's, else ~/.cache."""
    if own := os.environ.get("LORASTACK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorastack"


def share_cores() -> None:
    """Make the threads of this process, a server's, give up cores and the interpreter sooner.

    By default OpenMP's idle threads spin for milliseconds between steps, and threads of low
    priority hardly run. OpenMP reads its setting when torch is imported, so call this before; a
    user's own setting stays. A thread that computes in Python gives way to the step thread after
    half a millisecond, not after Python's five.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    sys.setswitchinterval(0.0005)


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5GiB", "64KiB", "2TiB" or a plain number.

    Raises ValueError on anything else, and on more than an address space holds.
    """
    match = _SIZE.fullmatch(text)
    if match is None or ("." in text and match["unit"] in ("", "B")):
        raise ValueError(f"{text!r} is not a size")
    nbytes = Decimal(match["number"]) * _UNITS[match["unit"]]  # a float is not exact beyond 2**53
    if nbytes >= 1 << 63:
        raise ValueError(f"{text!r} is more than an address space holds")
    return int(nbytes)
