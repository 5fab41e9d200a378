"""The composition root: configuration to a running gRPC server, and its orderly end."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from prometheus_client import CollectorRegistry

from lorastack import __version__
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.memory.device import Copy
from lorastack.adapters.memory.host import HostCache
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.threads import be_nice
from lorastack.adapters.store.learned import Learned
from lorastack.adapters.store.opening import Recovery
from lorastack.adapters.store.registry import Registry
from lorastack.config import ServerConfig
from lorastack.engine.engine import Engine
from lorastack.service.adapters import AdapterService
from lorastack.service.describe import labels, model_info, ready_line, served
from lorastack.service.dispatch import Dispatcher
from lorastack.service.door import Door
from lorastack.service.generation import GenerationService
from lorastack.service.grpc_server import make_server, raise_file_limit
from lorastack.service.health import Health
from lorastack.service.intake import Intake
from lorastack.service.learned import LearnedKeeper
from lorastack.service.limits import Lengths
from lorastack.service.metrics import RequestMetrics, StateCollector
from lorastack.service.ports import Ports
from lorastack.service.prepare import Preparer, ServedModel
from lorastack.service.probe import probe
from lorastack.service.provision import Provision
from lorastack.service.scrape import MetricsServer
from lorastack.service.status import CallGuard
from lorastack.service.store import StoreFollower, StoreWriter, needed_digests
from lorastack.service.threads import run_in
from lorastack.service.transfer import Transfers
from lorastack.service.untrusted import Untrusted
from lorastack.service.uploads import Uploads
from lorastack.service.wire import request_readers
from lorastack.startup.base import base_weight
from lorastack.startup.loading import Progress, adapter_loader, build_engine, load_model
from lorastack.v1 import adapters_pb2, generation_pb2
from lorastack.v1.adapters_pb2_grpc import add_AdapterServiceServicer_to_server as add_adapters
from lorastack.v1.generation_pb2_grpc import (
    add_GenerationServiceServicer_to_server as add_generation,
)

NUM_WORKERS = 4  # tokenising and registry look-ups
REFRESH_SECONDS = 2.0  # how old a read-only store's view may be
STOP_GRACE = 2.0  # seconds for handlers to send what the engine has ended
SERVICES = tuple(
    service.full_name
    for file in (generation_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
FILES = (  # of all services that there are
    *(generation_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR),
    *(health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR),
)
OTHER_CALLS = 256  # at once, beside those that wait or run in the engine

logger = logging.getLogger(__name__)


class Server:
    """Owns everything that runs: build, start, stop; or run, which does all three.

    dispatcher's deliver and fail are the engine's callbacks already.
    """

    def __init__(
        self,
        *,
        config: ServerConfig,
        model: ServedModel,
        engine: Engine,
        pool: DevicePool,
        host: HostCache,
        registry: Registry,
        learned: Learned,
        validate: Validator,
        dispatcher: Dispatcher,
        ports: Ports | None = None,
    ) -> None:
        """ports: reserved already; they are closed with the server."""
        self.address = ""  # host:port, once started
        self.metrics = CollectorRegistry()
        self._config = config.service
        self._ports = ports
        self._model = model
        self._engine = engine
        self._pool = pool
        self._registry = registry
        self._dispatcher = dispatcher
        requests = RequestMetrics(self.metrics)
        self.metrics.register(
            StateCollector(
                engine=engine,
                pool=pool,
                host=host,
                registry=registry,
                heads=requests.heads,
                config=config.adapters,
                info=labels(model),
            )
        )
        self._requests = requests
        self._guard = CallGuard(requests.call_ended)
        self._lengths = Lengths(max_context=model.max_context, max_files=config.adapters.max_files)
        # Parked rows are in the engine beside those that run or wait.
        self._max_calls = 2 * (config.engine.max_rows + config.engine.max_queue) + OTHER_CALLS
        self._workers = ThreadPoolExecutor(NUM_WORKERS, "lorastack-edge")
        self._uploader = ThreadPoolExecutor(1, "lorastack-upload", initializer=be_nice)
        self._preparer = Preparer(model, registry, config.adapters.default_medusa)
        self._untrusted = Untrusted(model.tokenizer, self._preparer.grammars, model.max_text)
        self._intake = Intake(self._preparer, self._untrusted, self._workers)
        self._generation = GenerationService(
            model=model,
            info=model_info(model, config),
            preparer=self._preparer,
            intake=self._intake,
            dispatcher=dispatcher,
            guard=self._guard,
            metrics=requests,
            workers=self._workers,
        )
        writer = StoreWriter(
            registry=registry,
            engine=engine,
            validate=replace(validate, check_template=self._untrusted.check_template),
            fingerprint=model.fingerprint,
            keep_revisions=config.adapters.keep_revisions,
            needed=partial(needed_digests, dispatcher, pool, self._preparer),
        )
        self._uploads = Uploads(
            max_files=config.adapters.max_files,
            registry=registry,
            writer=writer,
            readers=self._workers,
            uploader=self._uploader,
            idle=config.adapters.transfer_idle,
        )
        self._transfers = Transfers(
            config=config.adapters, registry=registry, writer=writer, uploader=self._uploader
        )
        self._adapters = AdapterService(
            registry=registry,
            writer=writer,
            uploads=self._uploads,
            transfers=self._transfers,
            engine=engine,
            pool=pool,
            host=host,
            dispatcher=dispatcher,
            preparer=self._preparer,
            guard=self._guard,
            readers=self._workers,
            uploader=self._uploader,
        )
        self._follower: StoreFollower | None = None
        self._keeper: LearnedKeeper | None = None
        if config.adapters.read_only_store:
            self._follower = StoreFollower(registry, engine)
        else:
            self._keeper = LearnedKeeper(learned, engine, self._uploader)
        self._background: list[asyncio.Task[None]] = []
        self._metrics_server: MetricsServer | None = None
        self._health = Health(SERVICES)
        self._server: grpc.aio.Server | None = None

    @classmethod
    def build(
        cls,
        config: ServerConfig,
        progress: Progress = lambda label, done, total: None,
        copy: Copy | None = None,
    ) -> Self:
        """Loads the model and opens the store. progress: what takes long, and bytes of it.

        copy: of adapters to the device, unless its own way is meant. Ports and the store come
        first, so that what is wrong with them is told before a model loads.
        """
        ports = Ports(config.service)
        try:
            return cls._build(config, ports, progress, copy)
        except BaseException:
            ports.close()
            raise

    @classmethod
    def _build(
        cls, config: ServerConfig, ports: Ports, progress: Progress, copy: Copy | None
    ) -> Self:
        limits = config.adapters
        model = config.model.model or "the default model"
        logger.info("lorastack %s: model %s, store %s", __version__, model, limits.store)
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
        loaded = load_model(config.model, config.engine.kv_memory, limits.device_memory, progress)
        validate = Validator(
            shapes=loaded.decoder.shapes,
            dtype=loaded.decoder.dtype,
            base_names=(loaded.name, loaded.path.name, *limits.base_names),
            base_weight=partial(base_weight, loaded.path),
            base_token=loaded.tokenizer.token_id,
        )
        provision = Provision(
            config=limits, model=loaded, registry=registry, validate=validate, progress=progress
        )
        provision.store_own_heads()
        provision.pull_default_heads()
        host = HostCache(limits.host_memory, adapter_loader(loaded, registry))
        pool = DevicePool(
            limits.device_memory, loaded.decoder.device, host, lambda: engine.wake(), copy=copy
        )
        dispatcher = Dispatcher(
            max_buffered=config.engine.max_buffered_events,
            max_parked=config.engine.max_parked,
            reader_timeout=config.engine.reader_timeout,
        )
        learned = Learned(limits.store, registry.knows)
        engine = build_engine(
            loaded, config.engine, pool, learned.texts, dispatcher.deliver, dispatcher.fail
        )
        return cls(
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
        )

    def run(self, on_ready: Callable[[str], None]) -> int:
        """Serves until SIGTERM or SIGINT, then drains. The exit code: 1 if the engine died.

        on_ready: gets one line for people when Generate works.
        """
        return asyncio.run(self._run(on_ready))

    async def start(self) -> None:
        """Listens, proves that a token comes out, then reports SERVING.

        Raises InvalidArgumentError when the address cannot be had, NotFoundError for unknown
        default heads, and what the first generation raises.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, timeout: float) -> None:
        """NOT_SERVING, new calls UNAVAILABLE; running ones get `timeout` seconds, then the same.

        May be called again.
        """
        began = time.monotonic()
        self._guard.draining = True
        for task in self._background:
            task.cancel()
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.to_thread(self._engine.drain, timeout)
        await asyncio.to_thread(self._engine.close)
        await self._untrusted.close()
        left = timeout - (time.monotonic() - began)
        await self._guard.idle(max(left, STOP_GRACE))
        if self._server is not None:
            await self._server.stop(STOP_GRACE)
        if self._ports is not None:
            self._ports.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        self._pool.close()
        await asyncio.to_thread(self._transfers.close)
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await keeper.save()
        for threads in (self._workers, self._uploader):
            # Beside the loop, which what still runs there may be waiting for.
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)
        self._registry.close()

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        readers = request_readers(FILES, self._lengths)
        self._door = Door(self._guard, readers, own="/lorastack.", max_calls=self._max_calls)
        server = make_server(
            [self._door],
            max_message_bytes=self._lengths.message_bytes,
            max_calls=self._max_calls,
            max_files=raise_file_limit(),
        )
        add_generation(self._generation, server)  # type: ignore[no-untyped-call]
        add_adapters(self._adapters, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.address = (self._ports or Ports(self._config)).listen(server)
        if port := self._config.metrics_port:
            self._metrics_server = MetricsServer(self._config.host, port, self.metrics)
        self._dispatcher.attach(self._engine, loop)
        self._untrusted.attach(loop)
        self._engine.start()
        await probe(self._preparer, self._dispatcher, self._workers)
        self._background.append(loop.create_task(self._requests.watch_loop()))
        if self._follower is not None:
            self._background.append(loop.create_task(self._follow(self._follower)))
        elif self._keeper is not None:
            self._background.append(loop.create_task(self._keeper.run()))
        self._background.append(loop.create_task(self._uploads.expire()))
        await server.start()
        self._server = server
        self._health.set(health_pb2.HealthCheckResponse.SERVING)

    async def _run(self, on_ready: Callable[[str], None]) -> int:
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()

        def ask(number: signal.Signals) -> None:
            logger.info("%s: draining; a second one ends at once", number.name)
            asked.set()
            loop.remove_signal_handler(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ask, number)
        await self.start()
        gc.freeze()  # a full collection walks all of torch and holds up a step for 0.1 s
        on_ready(ready_line(self._model, self.address))
        events = (asked.wait(), self._dispatcher.failed.wait())
        waiting = [asyncio.ensure_future(event) for event in events]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiting:
            waiter.cancel()
        failed = self._dispatcher.failed.is_set()
        await self.stop(0.0 if failed else self._config.drain_timeout)
        return 1 if failed or self._dispatcher.failed.is_set() else 0

    async def _follow(self, follower: StoreFollower) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await run_in(self._uploader, follower.refresh)
            except Exception:
                logger.exception("the store could not be read again; what is known stays")
