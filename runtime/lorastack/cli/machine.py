"""What the commands that run a model in their own process make of their options.

It imports torch, so only what they do imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorastack.cli.choices import Backend, Device, DType, Quantize
from lorastack.cli.options import default_store
from lorastack.cli.output import stage_bars, stage_log, startup_bars, startup_log
from lorastack.config import MIB, AdapterConfig, EngineConfig, ModelConfig, parse_size
from lorastack.errors import InvalidArgumentError
from lorastack.service.watch import logs
from lorastack.startup.device import device_defaults, find_device
from lorastack.startup.model import StartupProgress
from lorastack.train.progress import Progress

MOST_KV = 1536 * MIB  # prompts that come once gain nothing by more


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """adapters: None where no store is needed and there is none."""

    model: ModelConfig
    engine: EngineConfig
    adapters: AdapterConfig | None


def machine(
    *,
    model: str | None,
    base_names: list[str] | None,
    store: Path | None,
    needs_store: bool,
    device: Device,
    dtype: DType,
    backend: Backend,
    isa: str | None,
    quantize: Quantize | None,
    threads: int | None,
    kv_memory: str | None,
    max_rows: int | None,
    max_context: int | None,
) -> Machine:
    """The options as configuration. needs_store: adapters are named by ids.

    Raises InvalidArgumentError for a device or a needed store that is not there.
    """
    root = default_store() if store is None else store
    if needs_store and not root.exists():
        raise InvalidArgumentError(
            f"there is no store at {root}: name by --store that of the server with these adapters"
        )
    defaults = device_defaults(find_device(device.value))
    adapters = None
    if needs_store or root.is_dir():
        adapters = AdapterConfig(
            store=root, device_memory=defaults.adapter_memory, base_names=tuple(base_names or ())
        )
    return Machine(
        model=ModelConfig(
            model=model,
            device=device.value,
            dtype=dtype.value,
            backend=backend.value,
            isa=isa,
            quantize=None if quantize is None else quantize.value,
            threads=threads,
            max_context=max_context,
        ),
        engine=EngineConfig(
            kv_memory=None if kv_memory is None else parse_size(kv_memory),
            most_kv=MOST_KV,
            max_rows=defaults.max_rows if max_rows is None else max_rows,
        ),
        adapters=adapters,
    )


@contextmanager
def watching() -> Iterator[tuple[StartupProgress, Progress]]:
    """Progress of the model's loading and of the stages: bars on a terminal, else lines."""
    if not sys.stderr.isatty():
        logs.configure_logging("text", "info")
        yield startup_log(), stage_log()
        return
    logs.configure_logging("text", "warning")
    with startup_bars() as loading, stage_bars() as stages:
        yield loading, stages
