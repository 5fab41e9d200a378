"""Adapters of a store, or of folders, for an engine in this process.

What is used of the store is copied into one of the process' own, beside adapters that come from
folders: a server may go on writing the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.formats.facts import SharedHeads
from lorastack.adapters.formats.medusa import CONFIG_NAME
from lorastack.adapters.formats.private import is_private, shared_heads
from lorastack.adapters.sources.base import Limits, Pieces, SourceFile, copy_missing, pieces_of
from lorastack.adapters.sources.folder import find_files
from lorastack.adapters.store.ids import NO_HEADS
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig
from lorastack.errors import NotFoundError
from lorastack.modelfiles import read_object
from lorastack.request import HeadsUse, LoraUse
from lorastack.startup.model import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """LoRAs and heads of requests. template: the chat template that the only LoRA brings."""

    loras: tuple[LoraUse, ...] = ()
    heads: HeadsUse | None = None
    template: str | None = None


class LocalAdapters:
    """What the engine can load: its own store, and the one that adapters are taken from."""

    def __init__(
        self, model: LoadedModel, own: Registry, limits: AdapterConfig, store: Registry | None
    ) -> None:
        self._model = model
        self._own = own
        self._limits = Limits(max_files=limits.max_files, max_bytes=limits.max_upload)
        self._store = store
        self._catalogue = Catalogue(model, store or own, limits.default_medusa)
        self._validate = model.validator(limits.base_names)

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
