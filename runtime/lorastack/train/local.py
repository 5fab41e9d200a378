"""A model with its engine in this process, without a server: what distils and measures.

The store is opened read-only, if there is one. What is used of it is copied into a store of the
process' own, beside adapters that come from folders: a server may go on writing the first one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.formats.facts import SharedHeads
from lorastack.adapters.formats.medusa import CONFIG_NAME
from lorastack.adapters.formats.private import is_private, shared_heads
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.sources.base import Limits, Pieces, SourceFile, copy_missing, pieces_of
from lorastack.adapters.sources.folder import find_files
from lorastack.adapters.store.ids import NO_HEADS
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.engine.engine import Engine
from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.modelfiles import read_object
from lorastack.request import Final, GeneratedToken, HeadsUse, LoraUse, Request, RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.startup.engine import adapter_memory, build_engine
from lorastack.startup.model import LoadedModel, StartupProgress, load_model
from lorastack.startup.prior import check_acceptance
from lorastack.train.prompts import Prompt

Events = SimpleQueue[list[RowEvent] | BaseException]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """LoRAs and heads of requests. template: the chat template that the only LoRA brings."""

    loras: tuple[LoraUse, ...] = ()
    heads: HeadsUse | None = None
    template: str | None = None


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
        adapters: _Adapters,
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

    def encode(self, prompt: Prompt, selection: Selection) -> tuple[int, ...]:
        """The prompt's tokens: through the chat template, the selection's own or the model's.

        Without one a text goes as it is. Raises InvalidArgumentError for a conversation then, for
        messages that the template refuses, and for a token that the model lacks.
        """
        tokenizer, template = self.model.tokenizer, selection.template
        if template is None and prompt.is_text and tokenizer.chat_template is None:
            ids = tokenizer.encode(prompt.messages[-1][1])
        else:
            ids = tokenizer.encode_part(tokenizer.render(prompt.messages, template))
        if not ids or max(ids) >= self.model.backend.shapes.vocab_size:
            raise InvalidArgumentError("it has no tokens, or one that the model does not have")
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


class _Adapters:
    """What the engine can load: its own store, and the one that adapters are taken from."""

    def __init__(
        self, model: LoadedModel, own: Registry, limits: AdapterConfig, store: Registry | None
    ) -> None:
        self._model = model
        self._own = own
        self._limits = Limits(max_files=limits.max_files, max_bytes=limits.max_upload)
        self._store = store
        self._catalogue = Catalogue(model, store or own, limits.default_medusa)
        self._validate = Validator(
            shapes=model.backend.shapes,
            dtype=model.backend.dtype,
            base_names=(model.name, model.files.folder.name, *limits.base_names),
            base_weight=model.files.base_weight,
            base_token=model.tokenizer.token_id,
            check_acceptance=check_acceptance,
        )

    def select(self, loras: Sequence[tuple[str, float]], medusa_id: str) -> Selection:
        """See `LocalEngine`."""
        stack, heads = self._catalogue.resolve(loras, medusa_id)
        template = self._catalogue.own_template(loras[0][0]) if len(loras) == 1 else None
        for digest in (*(use.digest for use in stack), *(heads.digests if heads else ())):
            self._adopt(digest)
        return Selection(loras=stack, heads=heads, template=template)

    def add_folder(self, folder: Path) -> Selection:
        """See `LocalEngine`."""
        folder = folder.resolve()
        source = find_files(str(folder), [folder], self._limits, lambda: None)
        if (shared := _shared_heads(folder)) is not None:
            self._adopt_shared(shared)
        record = self._put(source.files)
        kind = record.manifest.facts.kind
        loras = [(record.id, 1.0)] if kind.has_lora else []
        own = Catalogue(self._model, self._own, NO_HEADS)
        stack, heads = own.resolve(loras, record.id if kind.has_heads else NO_HEADS)
        return Selection(
            loras=tuple(replace(use, lora_id=folder.name) for use in stack),
            heads=None if heads is None else replace(heads, medusa_id=folder.name),
            template=own.own_template(record.id) if stack else None,
        )

    def files(self, digest: str) -> dict[str, Path]:
        """See `LocalEngine`."""
        return self._own.files(digest)

    def _adopt(self, digest: str) -> None:
        """Copies an adapter of the store, which another process may change at any time."""
        if self._own.knows(digest) or self._store is None:
            return
        manifest = self._store.manifest(digest)
        if manifest.facts.shared_heads is not None:
            self._adopt_shared(manifest.facts.shared_heads)
        paths = {spec: self._store.path(spec) for spec in manifest.files}
        self._put(
            [SourceFile(spec=spec, read=partial(_read, path)) for spec, path in paths.items()],
            accept_base=True,
        )

    def _adopt_shared(self, shared: SharedHeads) -> None:
        """The heads that a private part corrects, if the store has them; a folder may have, too."""
        if self._store is not None:
            with suppress(NotFoundError):
                self._adopt(self._store.shared_heads(shared, self._model.fingerprint).digest)

    def _put(self, files: Sequence[SourceFile], *, accept_base: bool = False) -> Record:
        """Stores an adapter. accept_base: whatever it calls its base, it was accepted before."""
        adapter_id = f"adapter-{len(self._own.newest())}"
        upload = self._own.begin_upload(adapter_id, [file.spec for file in files])
        try:
            copy_missing(files, upload, lambda done, total: None)
            return upload.commit(
                partial(self._validate, accept_base=accept_base),
                base_fingerprint=self._model.fingerprint,
            )
        finally:
            upload.abort()


def _shared_heads(folder: Path) -> SharedHeads | None:
    """The heads that a folder's private part names; None for any other folder."""
    config = read_object(folder / CONFIG_NAME)
    return shared_heads(config, CONFIG_NAME) if is_private(config) else None


def _read(path: Path, offset: int) -> Pieces:
    """Bytes of a stored file. Raises NotFoundError if it was deleted meanwhile."""
    try:
        with path.open("rb") as file:
            yield from pieces_of(file, path.stat().st_size, offset)
    except FileNotFoundError as error:
        raise NotFoundError("an adapter was deleted while it was read; name another") from error


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
        known = _Adapters(loaded, own, limits, store)
        yield LocalEngine(loaded, built, events, known, max_running)
