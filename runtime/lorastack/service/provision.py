"""What a server puts into its store before it serves: its model's own heads, heads from the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.sources.base import Limits, SourceFile, copy_missing
from lorastack.adapters.sources.hub import HubAddress, open_hub
from lorastack.adapters.store.manifest import adapter_digest
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig
from lorastack.errors import LorastackError, NotFoundError, UnavailableError
from lorastack.startup.model import LoadedModel, StartupProgress
from lorastack.startup.own_heads import own_heads

log = logging.getLogger(__name__)


class Provision:
    """Makes uploads of the server's own, in the calling thread; nobody else uses the store yet."""

    def __init__(
        self,
        *,
        config: AdapterConfig,
        model: LoadedModel,
        registry: Registry,
        validate: Validator,
        progress: StartupProgress,
    ) -> None:
        self._config = config
        self._model = model
        self._registry = registry
        self._validate = validate
        self._progress = progress

    def store_own_heads(self) -> None:
        """Stores the heads that lie beside a Medusa-2 backbone and makes them the default.

        Only once: a later upload under their id, or another default, survives restarts. A default
        that belongs to another base model is replaced.
        """
        base = self._model.files
        files = own_heads(base.checkpoint, base.config.medusa, self._model.name)
        if not files:
            return
        adapter_id = own_heads_id(self._model.name)
        if adapter_digest([file.spec for file in files]) in self._digests(adapter_id):
            return
        if self._config.read_only_store:
            log.warning(
                "the model's own heads are not in the store, which this server only reads: start "
                "the server that writes the store once with this model"
            )
            return
        self._store(adapter_id, files)
        if not self._serves(self._registry.default_medusa()):
            self._registry.set_default_medusa(adapter_id)

    def pull_default_heads(self) -> None:
        """Pulls the heads of --medusa ORG/NAME from the hub, under that id, if the store lacks it.

        Raises NotFoundError if that organisation may not be pulled from, and what a pull raises.
        """
        hub_id = self._config.default_medusa
        organisation, slash, _ = hub_id.partition("/")
        if not slash or "@" in hub_id or self._config.read_only_store or self._digests(hub_id):
            return
        if organisation.casefold() not in {org.casefold() for org in self._config.pull_orgs}:
            raise NotFoundError(
                f"--medusa {hub_id}: the store has no such adapter; to have it pulled from the hub "
                f"at the start, add --pull-org {organisation}",
                adapter_id=hub_id,
            )
        limits = Limits(max_files=self._config.max_files, max_bytes=self._config.max_upload)
        address = HubAddress(hub_id=hub_id)
        with open_hub(address, self._config.pull_orgs, limits, lambda: None) as source:
            self._store(hub_id, source.files)

    def _store(self, adapter_id: str, files: Sequence[SourceFile]) -> None:
        upload = self._registry.begin_upload(adapter_id, [file.spec for file in files])
        try:
            copy_missing(files, upload, self._report(f"storing {adapter_id}"))
            record = upload.commit(self._validate, base_fingerprint=self._model.fingerprint)
        except (UnavailableError, KeyboardInterrupt):
            upload.suspend()  # the next start goes on from here
            raise
        except BaseException:
            upload.abort()
            raise
        log.info("stored %s, %s", record.id, record.digest)

    def _report(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(label, done, total)

    def _digests(self, adapter_id: str) -> set[str]:
        """The digests of an id's revisions."""
        try:
            return {record.digest for record in self._registry.revisions(adapter_id)}
        except LorastackError:  # none, or damaged: then the upload replaces it
            return set()

    def _serves(self, reference: str) -> bool:
        """True if `reference` names an adapter for this base model."""
        try:
            manifest = self._registry.resolve(reference).manifest
        except LorastackError:
            return False
        return manifest.base_fingerprint == self._model.fingerprint


def own_heads_id(model_name: str) -> str:
    """The id of a model's own heads: its name, made fit to be one, and "-medusa"."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", model_name.rpartition("/")[2]).lstrip("._-")
    return f"{cleaned[:89] or 'model'}-medusa"
