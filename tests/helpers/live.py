"""A server in this process, on a thread with an event loop of its own, and a client for it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.stream import Streams
from lorastack.client import Client
from lorastack.config import (
    MIB,
    AdapterConfig,
    EngineConfig,
    GatewayConfig,
    ModelConfig,
    ServerConfig,
    ServiceConfig,
)
from lorastack.engine.engine import Engine
from lorastack.service.build import build_server
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.costs import cheap_drafts

ROOMY = EngineConfig(kv_memory=64 * MIB, max_rows=8, max_step_tokens=64, max_nodes=6)
PATIENCE = 120.0  # seconds until a wait for something that must happen gives up


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls; fails when it has not come true in PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}: has not happened"
        time.sleep(0.001)


def ask(
    prompt: str | Sequence[int] = "hello there",
    *,
    stack: Sequence[tuple[str, float]] = (),
    heads: str = "none",
    max_new_tokens: int | None = 24,
    off: bool = False,
    ignore_eos: bool = False,
    stop: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    **fields: Any,
) -> pb.GenerateRequest:
    """A GenerateRequest in test words. stack: (lora id, scale); one at scale 1 goes as lora_id."""
    request = pb.GenerateRequest(
        medusa_id=heads,
        speculation=pb.Speculation(mode=pb.OFF if off else pb.AUTO),
        stop=pb.StopParams(
            max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, stop_sequences=stop
        ),
        sampling=pb.SamplingParams(**(sampling or {})),
        **fields,
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.token_ids.ids.extend(prompt)
    if len(stack) == 1 and stack[0][1] == 1.0:
        request.lora_id = stack[0][0]
    else:
        request.loras.extend(pb.LoraRef(lora_id=name, scale=scale) for name, scale in stack)
    return request


def join(parts: Sequence[pb.GenerateStreamResponse]) -> pb.GenerateResponse:
    """A stream's messages as one reply; only the last may be final."""
    assert [part.HasField("final") for part in parts] == [False] * (len(parts) - 1) + [True]
    reply = pb.GenerateResponse()
    reply.CopyFrom(parts[-1].final)
    assert not (reply.text or reply.token_ids or reply.tokens or reply.prompt_tokens)
    reply.text = "".join(part.text for part in parts)
    for part in parts:
        reply.token_ids.extend(part.token_ids)
        reply.tokens.extend(part.tokens)
        assert not (part.prompt_tokens and reply.token_ids[: -len(part.token_ids) or None])
        reply.prompt_tokens.extend(part.prompt_tokens)
    return reply


class LiveServer:
    """Serves `model` (None: the default one) until closed. digests: what `upload` stored, by id.

    Drafts are cheap, so that rows with heads draft on a tiny model too.
    """

    def __init__(
        self,
        model: Path | None,
        *,
        engine: EngineConfig,
        adapters: AdapterConfig,
        dtype: str = "float32",
        quantize: str | None = None,
        http: GatewayConfig | None = None,
        max_context: int | None = None,
        tensor_parallel: int = 1,
        streams: Streams | None = None,
    ) -> None:
        """streams: of a device that adapters are copied to; None: the host copies serve."""
        self._config = ServerConfig(
            model=ModelConfig(
                model=None if model is None else str(model),
                device="cpu",
                dtype=dtype,
                isa=os.environ.get("LORASTACK_ISA"),
                quantize=quantize,
                max_context=max_context,
                tensor_parallel=tensor_parallel,
            ),
            engine=engine,
            adapters=adapters,
            service=ServiceConfig(port=0, drain_timeout=5.0, http=http),
        )
        self._streams = streams
        self.digests: dict[str, str] = {}
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="test-server", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        with cheap_drafts():
            self.server = build_server(self._config, streams=self._streams)
        asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(PATIENCE)
        self.client = Client(self.server.address)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        return self.server._engine

    @property
    def pool(self) -> DevicePool:
        return self.server._pool

    def close(self) -> None:
        """Drains for a moment at most, then stops the thread."""
        self.client.close()
        asyncio.run_coroutine_threadsafe(self.server.stop(0.0), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def upload(self, name: str, folder: Path) -> None:
        self.digests[name] = self.client.upload(folder, name).digest

    def upload_all(self, folders: Mapping[str, Path]) -> None:
        for name, folder in folders.items():
            self.upload(name, folder)

    def load_heads(self, name: str) -> None:
        """Heads onto the device, and those that they correct. Rows do not wait for theirs: tests
        that count drafts call this."""

        def loaded() -> bool:
            reply = self.client.generate(ask("x", heads=name, max_new_tokens=4, ignore_eos=True))
            used = {reply.adapters.medusa_digest, reply.adapters.shared_medusa_digest} - {""}
            return used <= {each.digest for each in self.pool.stats().adapters}

        wait_until(loaded, f"{name} is on the device")

    def tokenize(self, prompt: str) -> list[int]:
        return self.client.tokenize(pb.TokenizeRequest(prompt=prompt))

    def stream(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """GenerateStream, its messages joined."""
        return join(list(self.client.stream(request)))

    def assert_idle(self) -> None:
        """Every request ended, and nothing is held: no page, no pin."""
        wait_until(lambda: self.engine.num_rows == 0, "all rows end")
        assert self.engine.num_pages["held"] == 0
        pins = {each.digest: each.in_use for each in self.pool.stats().adapters if each.in_use}
        assert pins == {}
