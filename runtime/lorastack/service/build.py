"""From a configuration to a server that can start: ports, store, model, engine, in this order."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from lorastack import __version__
from lorastack.adapters.memory.stream import Streams
from lorastack.adapters.store.learned import Learned
from lorastack.adapters.store.opening import Recovery
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig, ServerConfig
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.describe import served
from lorastack.service.edge.ports import Ports
from lorastack.service.provision import Provision
from lorastack.service.server import Server
from lorastack.startup.engine import adapter_memory, build_engine
from lorastack.startup.model import StartupProgress, load_model

logger = logging.getLogger(__name__)


def build_server(
    config: ServerConfig,
    progress: StartupProgress = lambda label, done, total: None,
    streams: Streams | None = None,
) -> Server:
    """Loads the model and opens the store. progress: called with (label, bytes done, bytes in all).

    streams: those of a device that adapters are copied to; None: the device's own. Ports and the
    store come first, so that what is wrong with them is told before a model loads. Raises
    LorastackError.
    """
    with ExitStack() as undo:
        ports = Ports(config.service)
        undo.callback(ports.close)
        server = _build(config, ports, progress, streams, undo)
        undo.pop_all()
    return server


def _build(
    config: ServerConfig,
    ports: Ports,
    progress: StartupProgress,
    streams: Streams | None,
    undo: ExitStack,
) -> Server:
    """undo: gets what must end if the rest fails."""
    limits = config.adapters
    model = config.model.model or "the default model"
    logger.info("lorastack %s: model %s, store %s", __version__, model, limits.store)
    registry = _open_store(limits)
    loaded = load_model(config.model, config.engine, limits.device_memory, progress)
    undo.callback(loaded.close)
    validate = loaded.validator(limits.base_names)
    provision = Provision(
        config=limits, model=loaded, registry=registry, validate=validate, progress=progress
    )
    provision.store_own_heads()
    provision.pull_default_heads()
    host, pool = adapter_memory(loaded, limits, registry, lambda: engine.wake(), streams)
    dispatcher = Dispatcher(
        max_buffered=config.engine.max_buffered_events,
        max_parked=config.engine.max_parked,
        reader_timeout=config.engine.reader_timeout,
    )
    loaded.watch(dispatcher.fail)
    learned = Learned(limits.store, registry.knows)
    engine = build_engine(
        loaded, config.engine, pool, learned.texts, dispatcher.deliver, dispatcher.fail
    )
    return Server(
        config=config,
        model=served(loaded, engine.max_context),
        engine=engine,
        pool=pool,
        host=host,
        registry=registry,
        learned=learned,
        validate=validate,
        dispatcher=dispatcher,
        ports=ports,
        close_model=loaded.close,
    )


def _open_store(limits: AdapterConfig) -> Registry:
    registry = Registry(
        limits.store,
        max_upload=limits.max_upload,
        max_files=limits.max_files,
        max_staged=limits.max_staged,
        read_only=limits.read_only_store,
    )
    if registry.recovery != Recovery(damaged=()):
        level = logging.WARNING if registry.recovery.damaged else logging.INFO
        logger.log(level, "store %s: %s", limits.store, registry.recovery)
    return registry
