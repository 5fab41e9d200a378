"""Servers around a fake engine, and adapters in a store without a server."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.learned import Learned
from lorastack.adapters.store.manifest import FileSpec, Record
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig, EngineConfig, ServerConfig, ServiceConfig
from lorastack.layout import ModelShapes
from lorastack.request import RowEvent
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.calls.served import ServedModel
from lorastack.service.edge.ports import Ports
from lorastack.service.server import Server
from lorastack.text.tokenizer import Tokenizer
from tests.service.fake_engine import PATIENCE, FakeEngine, FakeHost, FakePool

FINGERPRINT = "sha256:" + "ab" * 32
MAX_CONTEXT = 2048


def served_model(tokenizer: Tokenizer, shapes: ModelShapes) -> ServedModel:
    return ServedModel(
        name="tests/tiny",
        fingerprint=FINGERPRINT,
        tokenizer=tokenizer,
        vocab_size=shapes.vocab_size,
        max_context=MAX_CONTEXT,
        device="cpu",
        dtype="float32",
        kv_memory=1 << 20,
        quantization="",
        backend="fake",
        lossless=True,
        threads=3,
    )


def validator(shapes: ModelShapes) -> Validator:
    """For adapters that refer to no weight of the base."""

    def no_weight(name: str) -> Any:
        raise AssertionError(name)

    return Validator(shapes=shapes, base_names=("tiny",), base_weight=no_weight)


def store(
    registry: Registry,
    adapter_id: str,
    folder: Path,
    shapes: ModelShapes,
    fingerprint: str = FINGERPRINT,
) -> Record:
    """Stores an adapter's folder, as an upload does."""
    data = {path.name: path.read_bytes() for path in folder.iterdir()}
    specs = [
        FileSpec(name=name, size=len(content), sha256=sha256(content).hexdigest())
        for name, content in data.items()
    ]
    upload = registry.begin_upload(adapter_id, specs)
    for spec in specs:
        if spec.sha256 in upload.needed:
            upload.write(spec.sha256, 0, data[spec.name])

    return upload.commit(validator(shapes), base_fingerprint=fingerprint)


class FakeServer:
    """The real edge around a fake engine."""

    def __init__(
        self,
        store: Path,
        tokenizer: Tokenizer,
        shapes: ModelShapes,
        *,
        max_buffered: int = 64,
        metrics_port: int = 0,
        fingerprint: str = FINGERPRINT,
        **adapters: Any,
    ) -> None:
        """adapters: further fields of AdapterConfig."""
        self.dispatcher = Dispatcher(
            max_buffered=max_buffered, max_parked=256, reader_timeout=PATIENCE
        )
        self.pool, self.host = FakePool(), FakeHost()
        self.engine = FakeEngine(tokenizer, self._deliver, self.dispatcher.fail, self.pool)
        config = AdapterConfig(store=store, **adapters)
        self.registry = Registry(store, read_only=config.read_only_store)
        parts: dict[str, Any] = {"engine": self.engine, "pool": self.pool, "host": self.host}
        service = ServiceConfig(port=0, drain_timeout=PATIENCE, metrics_port=metrics_port)
        self.server = Server(
            config=ServerConfig(
                adapters=config,
                engine=EngineConfig(max_buffered_events=max_buffered),
                service=service,
            ),
            model=replace(served_model(tokenizer, shapes), fingerprint=fingerprint),
            registry=self.registry,
            learned=Learned(store, self.registry.knows),
            validate=validator(shapes),
            dispatcher=self.dispatcher,
            ports=Ports(service),
            **parts,
        )

    def _deliver(self, events: list[RowEvent]) -> None:
        self.dispatcher.deliver(events)


class RunningServer(FakeServer):
    """A FakeServer on a thread with an event loop, started and stopped by `with`."""

    def __enter__(self) -> Self:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fake-server")
        self._thread.start()
        try:
            self.run(self.server.start())
        except BaseException:
            self._end()
            raise
        self.address = self.server.address
        self.engine.submitted.clear()  # the probe
        self.engine.calls.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """May be called again."""
        if not self.loop.is_closed():
            self.engine.go_on()
            self.run(self.server.stop(0.0))
            self._end()

    def _deliver(self, events: list[RowEvent]) -> None:
        """Returns once the loop has routed the events, as it has before a real step ends."""
        routed = threading.Event()
        super()._deliver(events)
        self.loop.call_soon_threadsafe(routed.set)
        routed.wait(PATIENCE)

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.registry.close()

    def run(self, coroutine: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)
