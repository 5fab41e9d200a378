"""Changes to the store and what they mean for the engine, made by the uploader's one thread."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from lorastack.adapters.load import Validator
from lorastack.adapters.manifest import Record
from lorastack.adapters.registry import Registry
from lorastack.adapters.upload import Upload
from lorastack.engine.engine import Engine
from lorastack.errors import DataLossError, NotFoundError


class StoreWriter:
    """Commits, deletes and rolls back; what no id points to any more leaves the engine's memory.

    Running rows finish on the old bytes: `Engine.forget` waits for them.
    """

    def __init__(
        self, *, registry: Registry, engine: Engine, validate: Validator, fingerprint: str
    ) -> None:
        """fingerprint: of the base model that `validate` compares with."""
        self._registry = registry
        self._engine = engine
        self._validate = validate
        self._fingerprint = fingerprint

    def commit(self, upload: Upload, *, accept_base: bool) -> Record:
        """Validates and publishes an upload. Raises what is wrong with it."""
        replaced = self._newest(upload.id)
        validate = partial(self._validate, accept_base=accept_base)
        record = upload.commit(validate, base_fingerprint=self._fingerprint)
        self._forget(replaced)
        return record

    def rollback(self, adapter_id: str, digest: str) -> Record:
        """Makes an earlier revision's content the newest one. Raises NotFoundError."""
        replaced = self._newest(adapter_id)
        record = self._registry.rollback(adapter_id, digest)
        self._forget(replaced)
        return record

    def delete(self, adapter_id: str, in_use: Collection[str]) -> None:
        """Removes an id. in_use: digests of requests that have not ended. Raises NotFoundError."""
        try:
            digests = {record.digest for record in self._registry.revisions(adapter_id)}
        except (NotFoundError, DataLossError):  # nobody could be served from it
            digests = set()
        self._registry.delete(adapter_id, in_use=in_use)
        self._forget(digests)

    def _newest(self, adapter_id: str) -> set[str]:
        try:
            return {self._registry.resolve(adapter_id).digest}
        except (NotFoundError, DataLossError):
            return set()

    def _forget(self, replaced: set[str]) -> None:
        for digest in replaced - _newest_digests(self._registry):
            self._engine.forget(digest)


class StoreFollower:
    """Keeps up with a store that another process writes. One thread at a time."""

    def __init__(self, registry: Registry, engine: Engine) -> None:
        """registry: opened read-only."""
        self._registry = registry
        self._engine = engine
        self._known = _newest_digests(registry)

    def refresh(self) -> None:
        """Takes in what has changed; cheap when nothing has."""
        if not self._registry.refresh():
            return
        before, self._known = self._known, _newest_digests(self._registry)
        for digest in before - self._known:
            self._engine.forget(digest)


def _newest_digests(registry: Registry) -> set[str]:
    """What the ids point to."""
    return {record.digest for record in registry.list()}
