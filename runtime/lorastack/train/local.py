"""A model with its engine in this process, without a server: what distils and measures.

The store is opened read-only, if there is one; `train.adapters` takes from it what is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.engine.engine import Engine
from lorastack.errors import InvalidArgumentError
from lorastack.request import Final, GeneratedToken, HeadsUse, Request, RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.startup.engine import adapter_memory, build_engine
from lorastack.startup.model import LoadedModel, StartupProgress, load_model
from lorastack.train.adapters import LocalAdapters, Selection
from lorastack.train.prompts import Prompt

__all__ = ["LocalEngine", "Reply", "Selection", "open_engine"]

Events = SimpleQueue[list[RowEvent] | BaseException]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A request that has ended. states_TH: on the host, if the request captures them; else None."""

    request: Request
    tokens: tuple[GeneratedToken, ...]
    states_TH: Tensor | None
    final: Final


@dataclass(slots=True)
class _Running:
    """A request's events so far."""

    request: Request
    tokens: list[GeneratedToken] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def take(self, event: RowEvent) -> None:
        self.tokens += event.tokens
        if event.states is not None:
            assert isinstance(event.states, Tensor)
            self.states.append(event.states)

    def reply(self, final: Final) -> Reply:
        return Reply(
            request=self.request,
            tokens=tuple(self.tokens),
            states_TH=torch.cat(self.states) if self.states else None,
            final=final,
        )


class LocalEngine:
    """See the module; `open_engine` makes it. Used by one thread."""

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        events: Events,
        adapters: LocalAdapters,
        max_running: int,
    ) -> None:
        """events: what the engine tells. max_running: requests that it has at a time."""
        self.model = model
        self.max_context = engine.max_context
        self._engine = engine
        self._events = events
        self._unread: deque[RowEvent] = deque()
        self._adapters = adapters
        self._max_running = max_running

    @property
    def num_preemptions(self) -> int:
        """See `Engine`."""
        return self._engine.num_preemptions

    def select(self, loras: Sequence[tuple[str, float]] = (), medusa_id: str = "") -> Selection:
        """LoRAs by (id, scale), or one alias; heads as a request of a server gets them.

        medusa_id: "" for those that an alias or the only LoRA brings, or the store's default;
        NO_HEADS for none. Raises NotFoundError, FailedPreconditionError for an adapter of another
        base model, InvalidArgumentError for one of the wrong kind.
        """
        return self._adapters.select(loras, medusa_id)

    def add_folder(self, folder: Path) -> Selection:
        """The LoRA, the heads, or both of a folder that need not be in any store.

        Raises what an upload of it would raise.
        """
        return self._adapters.add_folder(folder)

    def files(self, digest: str) -> dict[str, Path]:
        """Name -> path of the files of an adapter that was selected or added."""
        return self._adapters.files(digest)

    def load(self, heads: HeadsUse) -> None:
        """Brings heads to the device, to stay: rows do not wait for theirs.

        Raises FailedPreconditionError if they can never fit.
        """
        needs = heads.digests[:-1]
        self._engine.load(heads.digest, pin=True, needs=needs).result()

    def learned(self) -> dict[str, Calibration]:
        """What was learnt about heads since the last call, by digest."""
        return self._engine.learned().result()

    def forget(self, heads: HeadsUse) -> None:
        """What was learnt about heads goes, and so do their copies in memory."""
        self._engine.unload(heads.digest).result()
        self._engine.forget(heads.digest)

    def encode(self, prompt: Prompt, selection: Selection, room: int = 0) -> tuple[int, ...]:
        """The prompt's tokens: through the chat template, the selection's own or the model's.

        Without one a text goes as it is. Raises InvalidArgumentError for a conversation then, for
        messages that the template refuses, for a token that the model lacks, and where the context
        has no room for so many tokens behind them.
        """
        tokenizer, template = self.model.tokenizer, selection.template
        if template is None and prompt.is_text and tokenizer.chat_template is None:
            ids = tokenizer.encode(prompt.messages[-1][1])
        else:
            ids = tokenizer.encode_part(tokenizer.render(prompt.messages, template))
        if not ids or max(ids) >= self.model.backend.shapes.vocab_size:
            raise InvalidArgumentError("it has no tokens, or one that the model does not have")
        if len(ids) + room > self.max_context:
            raise InvalidArgumentError(
                f"it has {len(ids)} tokens, and the context holds {self.max_context}"
            )
        return tuple(ids)

    def run(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Replies as they end. Takes requests as the engine has room for rows: few more than run.

        Raises what a request fails with; then, and where the iterator is closed early, the others
        are cancelled. request_id must be unique among those that run.
        """
        source = iter(requests)
        running: dict[str, _Running] = {}
        try:
            while True:
                while len(running) < self._max_running:
                    if (request := next(source, None)) is None:
                        break
                    self._engine.submit(request)
                    running[request.request_id] = _Running(request)
                if not running:
                    return
                event = self._next()
                row = running[event.request_id]
                row.take(event)
                if event.last:
                    del running[event.request_id]
                if event.error is not None:
                    raise event.error
                if event.final is not None:
                    yield row.reply(event.final)
        finally:
            self._cancel(set(running))

    def _next(self) -> RowEvent:
        """The next event of any row. Raises what the engine failed with, from then on always."""
        while not self._unread:
            events = self._events.get()
            if isinstance(events, BaseException):
                self._events.put(events)
                raise events
            self._unread.extend(events)
        return self._unread.popleft()

    def _cancel(self, request_ids: set[str]) -> None:
        """Ends rows, and waits until nothing comes of them any more."""
        for request_id in request_ids:
            self._engine.cancel(request_id)
        while request_ids:
            event = self._next()
            if event.last:
                request_ids.remove(event.request_id)


@contextmanager
def open_engine(
    model: ModelConfig,
    engine: EngineConfig,
    adapters: AdapterConfig | None = None,
    progress: StartupProgress = lambda label, done, total: None,
) -> Iterator[LocalEngine]:
    """A model, ready to run. adapters: the store and its limits; None: there is no store.

    Raises what `load_model` and opening a store raise.
    """
    with ExitStack() as stack:
        store = None
        if adapters is not None:
            store = Registry(adapters.store, read_only=True)
            stack.callback(store.close)
        folder = stack.enter_context(TemporaryDirectory(prefix="lorastack-"))
        limits = adapters or AdapterConfig(store=Path(folder))
        loaded = load_model(model, engine, limits.device_memory, progress)
        stack.callback(loaded.close)
        own = Registry(
            Path(folder),
            max_upload=limits.max_upload,
            max_files=limits.max_files,
            max_staged=limits.max_staged,
        )
        stack.callback(own.close)
        events: Events = SimpleQueue()
        _, pool = adapter_memory(loaded, limits, own, lambda: built.wake())
        stack.callback(pool.close)
        loaded.watch(events.put)
        built = build_engine(loaded, engine, pool, {}, events.put, events.put)
        built.start()
        stack.callback(built.close)
        max_running = max(1, min(2 * engine.max_rows, engine.max_queue))  # all may wait
        known = LocalAdapters(loaded, own, limits, store)
        yield LocalEngine(loaded, built, events, known, max_running)
