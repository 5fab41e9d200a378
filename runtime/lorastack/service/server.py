"""A server's life: its parts are made, it starts, serves and stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.memory.host import HostCache
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.threads import be_nice
from lorastack.adapters.store.learned import Learned
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig, ServerConfig
from lorastack.engine.engine import Engine
from lorastack.gateway.serving import GatewayThread, bind
from lorastack.service.adapters.keeper import LearnedKeeper
from lorastack.service.adapters.merging import Merges
from lorastack.service.adapters.servicer import AdapterService
from lorastack.service.adapters.transfer import Transfers
from lorastack.service.adapters.uploads import Uploads
from lorastack.service.adapters.writer import StoreFollower, StoreWriter, needed_digests
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.calls.generation import GenerationService
from lorastack.service.calls.intake import NUM_LONG, NUM_SHORT, Intake
from lorastack.service.calls.prepare import Preparer
from lorastack.service.calls.served import ServedModel
from lorastack.service.calls.untrusted import Untrusted
from lorastack.service.describe import labels, model_info, ready_line
from lorastack.service.edge.door import Door
from lorastack.service.edge.grpc_server import make_server, raise_file_limit
from lorastack.service.edge.health import Health
from lorastack.service.edge.limits import Lengths
from lorastack.service.edge.ports import Ports
from lorastack.service.edge.status import CallGuard
from lorastack.service.edge.wire import request_readers
from lorastack.service.probe import probe
from lorastack.service.services import FILES, SERVICES, add_services
from lorastack.service.watch.exposition import Exposition
from lorastack.service.watch.metrics import RequestMetrics, StateCollector
from lorastack.service.watch.routers import RouterCollector
from lorastack.service.watch.scrape import MetricsServer

STOP_GRACE = 2.0  # seconds for handlers to send what the engine has ended
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
OTHER_CALLS = 256  # calls at a time, beside those that wait or run in the engine

logger = logging.getLogger(__name__)

Loop = Callable[[], Coroutine[Any, Any, None]]


class Server:
    """Owns everything that runs, and ends it: start and stop, or run, which does both."""

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
        ports: Ports,
        close_model: Callable[[], None] = lambda: None,
    ) -> None:
        """dispatcher: the engine has its deliver and fail as callbacks already. ports: reserved
        already; they are closed with the server. close_model: called after the last step."""
        self.address = ""  # host:port, once started
        self._config = config.service
        self._ports = ports
        self._model = model
        self._close_model = close_model
        self._engine = engine
        self._pool = pool
        self._host = host
        self._registry = registry
        self._dispatcher = dispatcher
        self._workers = ThreadPoolExecutor(NUM_LONG + NUM_SHORT, "lorastack-edge")
        self._uploader = ThreadPoolExecutor(1, "lorastack-upload", initializer=be_nice)
        self._make_metrics(config)
        self._guard = CallGuard(self._requests.call_ended)
        self._lengths = Lengths(max_context=model.max_context, max_files=config.adapters.max_files)
        # Parked rows are in the engine beside those that run or wait.
        self._max_calls = 2 * (config.engine.max_rows + config.engine.max_queue) + OTHER_CALLS
        self._catalogue = Catalogue(model, registry, config.adapters.default_medusa)
        self._preparer = Preparer(model, self._catalogue)
        self._untrusted = Untrusted(model.tokenizer, self._preparer.grammars, model.max_text)
        self._make_generation(config)
        self._make_adapters(config.adapters, validate)
        self._health = Health(SERVICES)
        self._keeper: LearnedKeeper | None = None
        # What runs beside the calls, until it is cancelled.
        self._loops: list[Loop] = [self._requests.watch_loop, self._uploads.expire]
        if config.adapters.read_only_store:
            self._loops.append(StoreFollower(registry, engine, self._uploader).run)
        else:
            self._keeper = LearnedKeeper(learned, engine, self._uploader)
            self._loops.append(self._keeper.run)
        self._background: list[asyncio.Task[None]] = []
        self._metrics_server: MetricsServer | None = None
        self._gateway: GatewayThread | None = None
        self.http_address = ""  # host:port of the gateway, once started
        self._server: grpc.aio.Server | None = None

    def run(self, on_ready: Callable[[str], None]) -> int:
        """Serves until SIGTERM or SIGINT, then drains. Returns the exit code: 1 if the engine died.

        on_ready: gets one line for people when Generate works.
        """
        before = signal.getsignal(signal.SIGINT)
        try:
            return asyncio.run(self._run(on_ready))
        finally:
            signal.signal(signal.SIGINT, before)

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
        """Reports NOT_SERVING and refuses new calls; running ones have `timeout` seconds to end.

        May be called again.
        """
        began = time.monotonic()
        self._guard.draining = True
        for task in self._background:
            task.cancel()
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.to_thread(self._engine.drain, timeout)
        await asyncio.to_thread(self._engine.close)
        await asyncio.to_thread(self._close_model)
        await self._untrusted.close()
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            await asyncio.to_thread(gateway.close)
        left = timeout - (time.monotonic() - began)
        await self._guard.idle(max(left, STOP_GRACE))
        if self._server is not None:
            await self._server.stop(STOP_GRACE)
        self._ports.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        self._pool.close()
        await asyncio.to_thread(self._transfers.close)
        await asyncio.to_thread(self._merges.close)
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await keeper.save()
        for threads in (self._workers, self._uploader):
            # Off the loop: what still runs there may wait for the loop.
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)
        self._registry.close()

    def _make_metrics(self, config: ServerConfig) -> None:
        self.metrics = CollectorRegistry()
        self._requests = RequestMetrics(self.metrics)
        self.metrics.register(
            StateCollector(
                engine=self._engine,
                pool=self._pool,
                host=self._host,
                registry=self._registry,
                heads=self._requests.heads,
                config=config.adapters,
                info=labels(self._model),
            )
        )
        routers = RouterCollector(
            engine=self._engine,
            pool=self._pool,
            registry=self._registry,
            model_name=self._model.name,
            page_size=config.engine.page_size,
            device_memory=config.adapters.device_memory,
        )
        self.exposition = Exposition(self.metrics, routers)

    def _make_generation(self, config: ServerConfig) -> None:
        self._intake = Intake(self._catalogue, self._preparer, self._untrusted, self._workers)
        self._generation = GenerationService(
            model=self._model,
            info=model_info(self._model, config),
            catalogue=self._catalogue,
            intake=self._intake,
            dispatcher=self._dispatcher,
            guard=self._guard,
            metrics=self._requests,
            exposition=self.exposition,
            workers=self._workers,
        )

    def _make_adapters(self, config: AdapterConfig, validate: Validator) -> None:
        needed = partial(needed_digests, self._dispatcher, self._pool, self._catalogue)
        writer = StoreWriter(
            registry=self._registry,
            engine=self._engine,
            validate=replace(validate, check_template=self._untrusted.check_template),
            check_alias=self._catalogue.check_alias,
            fingerprint=self._model.fingerprint,
            keep_revisions=config.keep_revisions,
            needed=needed,
        )
        self._uploads = Uploads(
            max_files=config.max_files,
            registry=self._registry,
            writer=writer,
            readers=self._workers,
            uploader=self._uploader,
            idle=config.transfer_idle,
        )
        self._transfers = Transfers(
            config=config, registry=self._registry, writer=writer, uploader=self._uploader
        )
        self._merges = Merges(
            config=config,
            registry=self._registry,
            writer=writer,
            catalogue=self._catalogue,
            pool=self._pool,
            shapes=validate.shapes,
            fingerprint=self._model.fingerprint,
            needed=needed,
            readers=self._workers,
            uploader=self._uploader,
        )
        self._adapters = AdapterService(
            registry=self._registry,
            writer=writer,
            uploads=self._uploads,
            transfers=self._transfers,
            merges=self._merges,
            engine=self._engine,
            pool=self._pool,
            host=self._host,
            dispatcher=self._dispatcher,
            catalogue=self._catalogue,
            guard=self._guard,
            readers=self._workers,
            uploader=self._uploader,
        )

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
        add_services(server, self._generation, self._adapters, self._health)
        self.address = self._ports.listen(server)
        if port := self._config.metrics_port:
            self._metrics_server = MetricsServer(self._config.host, port, self.exposition)
        self._dispatcher.attach(self._engine, loop)
        self._untrusted.attach(loop)
        self._engine.start()
        await probe(self._preparer, self._dispatcher, self._workers)
        self._background += [loop.create_task(work()) for work in self._loops]
        await server.start()
        self._server = server
        if (http := self._config.http) is not None:
            http = replace(http, target=self.address)
            scrape = self.exposition.render
            self._gateway = await asyncio.to_thread(GatewayThread, http, bind(http), scrape)
            self.http_address = self._gateway.address
        self._health.set(health_pb2.HealthCheckResponse.SERVING)

    async def _run(self, on_ready: Callable[[str], None]) -> int:
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()

        def ask(number: signal.Signals) -> None:
            logger.info("%s: draining; a second signal ends at once", number.name)
            asked.set()
            for known in STOP_SIGNALS:
                loop.remove_signal_handler(known)
                signal.signal(known, signal.SIG_DFL)  # a KeyboardInterrupt would wait for threads

        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, ask, number)
        await self.start()
        gc.freeze()  # a full collection walks all of torch and holds up a step for 0.1 s
        on_ready(ready_line(self._model, self.address, self.http_address))
        events = (asked.wait(), self._dispatcher.failed.wait())
        waiting = [asyncio.ensure_future(event) for event in events]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiting:
            waiter.cancel()
        failed = self._dispatcher.failed.is_set()
        await self.stop(0.0 if failed else self._config.drain_timeout)
        return 1 if failed or self._dispatcher.failed.is_set() else 0
