"""Changes of the store and what they mean for the engine, made by the uploader's one thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.formats.alias import Alias
from lorastack.adapters.formats.parse import ParsedAdapter
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.store.ids import split_reference
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Pruned, Registry
from lorastack.adapters.store.upload import Upload
from lorastack.engine.engine import Engine
from lorastack.errors import DataLossError, LorastackError, NotFoundError
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.edge.threads import run_in

REFRESH_SECONDS = 2.0  # how old a read-only store's view may be

logger = logging.getLogger(__name__)


class StoreWriter:
    """Commits, deletes and rolls back; what no id points to any more leaves the engine's memory.

    Running rows finish on the old bytes: `Engine.forget` waits for them.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        engine: Engine,
        validate: Validator,
        check_alias: Callable[[str, Alias], None],
        fingerprint: str,
        keep_revisions: int,
        needed: Callable[[], Collection[str]],
    ) -> None:
        """check_alias: raises unless what an alias of this id names is stored. fingerprint: the
        base model's, which `validate` compares with. keep_revisions: revisions
        of each id that stay. needed: digests that stay beside them, as rows or pins may load them
        again; may be called in any thread.
        """
        self._registry = registry
        self._engine = engine
        self._validate = validate
        self._check_alias = check_alias
        self._fingerprint = fingerprint
        self._keep_revisions = keep_revisions
        self._needed = needed

    def commit(self, upload: Upload, *, accept_base: bool) -> Record:
        """Validates and publishes an upload. Raises what is wrong with it."""
        replaced = self._newest(upload.id)

        def validate(files: Mapping[str, Path]) -> ParsedAdapter:
            parsed = self._validate(files, accept_base=accept_base)
            if parsed.facts.alias is not None:
                self._check_alias(upload.id, parsed.facts.alias)
            return parsed

        record = upload.commit(validate, base_fingerprint=self._fingerprint)
        self._forget(replaced)
        self._prune_quietly(upload.id)
        return record

    def rollback(self, adapter_id: str, digest: str) -> Record:
        """Makes an earlier revision's content the newest one. Raises NotFoundError."""
        replaced = self._newest(adapter_id)
        record = self._registry.rollback(adapter_id, digest)
        self._forget(replaced)
        self._prune_quietly(adapter_id)
        return record

    def prune(self, adapter_id: str, keep: int | None) -> Pruned:
        """Removes old revisions of an id; of every id if it is "". Raises NotFoundError.

        keep: revisions of an id that stay; None: as many as the server keeps anyway.
        """
        keep = self._keep_revisions if keep is None else keep
        pruned = self._registry.prune(keep, adapter_id, in_use=self._needed())
        for digest in pruned.digests:
            self._engine.forget(digest)
        return pruned

    def delete(self, adapter_id: str, in_use: Collection[str]) -> None:
        """Removes an id. in_use: digests of requests that have not ended. Raises NotFoundError."""
        try:
            digests = _digests(self._registry, self._registry.revisions(adapter_id))
        except (NotFoundError, DataLossError):  # nobody could be served from it
            digests = set()
        self._registry.delete(adapter_id, in_use=in_use)
        self._forget(digests)

    def forget_deleted(self, digest: str) -> None:
        """Says again to the engine that a digest was deleted, unless an id has it again."""
        if not self._registry.knows(digest):
            self._engine.forget(digest)

    def _prune_quietly(self, adapter_id: str) -> None:
        """The change itself has succeeded; what could not be removed goes another time."""
        try:
            self.prune(adapter_id, None)
        except (LorastackError, OSError):
            logger.warning("old revisions of %s could not be removed", adapter_id, exc_info=True)

    def _newest(self, adapter_id: str) -> set[str]:
        """The digests that requests for the id get; none if it is not there."""
        try:
            return _digests(self._registry, [self._registry.resolve(adapter_id)])
        except (NotFoundError, DataLossError):
            return set()

    def _forget(self, replaced: set[str]) -> None:
        for digest in replaced - _newest_digests(self._registry):
            self._engine.forget(digest)


class StoreFollower:
    """Keeps up with a store that another process writes."""

    def __init__(self, registry: Registry, engine: Engine, uploader: Executor) -> None:
        """registry: opened read-only. uploader: one thread."""
        self._registry = registry
        self._engine = engine
        self._uploader = uploader
        self._known = _newest_digests(registry)

    async def run(self) -> None:
        """Refreshes now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await run_in(self._uploader, self.refresh)
            except Exception:
                logger.exception("the store could not be read again; what is known stays")

    def refresh(self) -> None:
        """Takes in what has changed; cheap when nothing has. One thread at a time."""
        if not self._registry.refresh():
            return
        before, self._known = self._known, _newest_digests(self._registry)
        for digest in before - self._known:
            self._engine.forget(digest)


def _newest_digests(registry: Registry) -> set[str]:
    """The digests that requests get by the ids that there are now."""
    return _digests(registry, registry.list())


def _digests(registry: Registry, records: Iterable[Record]) -> set[str]:
    """Of the records, and of the heads that private parts among them correct."""
    return {digest for record in records for digest in registry.digests_of(record)}


def needed_digests(dispatcher: Dispatcher, pool: DevicePool, catalogue: Catalogue) -> set[str]:
    """Digests that running requests, pins or the default heads may load again."""
    pinned = {adapter.digest for adapter in pool.stats().adapters if adapter.pinned}
    _, default = split_reference(catalogue.default_medusa)
    return {*dispatcher.digests_in_use(), *pinned, *([default] if default else [])}
