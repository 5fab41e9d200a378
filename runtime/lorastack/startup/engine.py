"""From a loaded model to a ready engine, and to the memory of its adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from lorastack.adapters.memory.arena import DeviceArena, PinnedArena
from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.host import HostCache
from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.stream import Streams, device_streams
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig, EngineConfig
from lorastack.engine.costs import measure
from lorastack.engine.engine import Engine
from lorastack.engine.pages import Pages
from lorastack.engine.runner import Runner
from lorastack.engine.views import make_views
from lorastack.kernels.packing import allocate
from lorastack.model.backends.parallel.backend import ParallelBackend
from lorastack.request import RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.startup.memory import host_memory, pinned_memory
from lorastack.startup.model import LoadedModel

log = logging.getLogger(__name__)


def adapter_memory(
    model: LoadedModel,
    limits: AdapterConfig,
    registry: Registry,
    on_loaded: Callable[[], None],
    streams: Streams | None = None,
) -> tuple[HostCache, DevicePool]:
    """Host and device copies, packed as this model's backend reads them.

    on_loaded: see `DevicePool`. streams: None for the device's own; on a CPU, where it has none,
    the host copies serve.
    """
    backend, device = model.backend, model.backend.device
    host_budget, budget = limits.host_memory, limits.device_memory
    views = partial(make_views, backend)
    pinned = copies = None
    if device.type == "cuda":
        host_budget = pinned_memory(host_budget, host_memory())
        pinned = PinnedArena(host_budget, lambda: host.drop_oldest())
    if streams := streams or device_streams(device):
        arena = DeviceArena(budget, device, streams)
        copies = Copies(arena, streams, backend.head_rows, on_loaded, views)
    empty, idle = (None, None) if pinned is None else (pinned.empty, pinned.grow)
    loader = Loader(
        registry=registry,
        shapes=backend.shapes,
        allocate=partial(allocate, dtype=backend.dtype, empty=empty),
        head_rows=backend.head_rows if pinned is None else None,
    )
    host = HostCache(host_budget, loader)
    pool = DevicePool(
        budget,
        host,
        on_loaded,
        copies=copies,
        others=backend.loras if isinstance(backend, ParallelBackend) else None,
        idle=idle,
        make_views=views,
    )
    return host, pool


def build_engine(
    model: LoadedModel,
    config: EngineConfig,
    pool: DevicePool,
    learned: Mapping[str, str],
    on_events: Callable[[list[RowEvent]], None],
    on_failure: Callable[[BaseException], None],
) -> Engine:
    """The engine on a loaded model.

    learned: what an earlier one knew about heads, by digest (`Engine.learned`, as JSON). Any
    request within `Engine.max_context` fits in its KV memory.
    """
    backend = model.backend
    shapes = backend.shapes
    num_pages = model.num_pages
    max_context = min(shapes.max_context, num_pages * config.page_size)
    if max_context < shapes.max_context:
        log.warning(
            "--kv-memory holds %d tokens: the context is limited to that, the model allows %d",
            max_context,
            shapes.max_context,
        )
    kv = backend.make_kv(num_pages, config.page_size)
    backend.prepare(kv)
    runner, pages = Runner(backend, kv), Pages(num_pages, config.page_size)
    return Engine(
        config=config,
        runner=runner,
        tokenizer=model.tokenizer,
        pages=pages,
        pool=pool,
        costs=measure(runner, pages, max_context, backend.device.type == "cuda"),
        calibrations={digest: Calibration.from_json(text) for digest, text in learned.items()},
        max_context=max_context,
        vocab_size=shapes.vocab_size,
        on_events=on_events,
        on_failure=on_failure,
    )
