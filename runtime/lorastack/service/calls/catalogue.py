"""The adapters that this server can serve: ids to digests, default heads, whose template is whose.

Look-ups read the registry's tables in memory. What touches files (`own_template`,
`set_default_medusa`) belongs into worker threads. Nothing here runs what an adapter brings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lorastack.adapters.store.ids import NO_HEADS, RESERVED_IDS
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.request import HeadsUse, LoraUse
from lorastack.service.calls.served import ServedModel
from lorastack.service.calls.templates import OwnTemplates

logger = logging.getLogger(__name__)


class Catalogue:
    """The registry as callers of one base model see it. Thread-safe; it keeps templates only."""

    def __init__(self, model: ServedModel, registry: Registry, fixed_default: str) -> None:
        """fixed_default: --medusa, an id or NO_HEADS, which wins over what the store says; "" if
        not given."""
        self._model = model
        self._registry = registry
        self._fixed_default = fixed_default
        self._templates = OwnTemplates(registry, model.tokenizer.chat_template)

    def resolve(
        self, loras: Sequence[tuple[str, float]], medusa_id: str
    ) -> tuple[tuple[LoraUse, ...], HeadsUse | None]:
        """A call's LoRAs, (id, scale) pairs, as a stack in order of digest; and its heads.

        Heads are those of medusa_id, else those that the call's only LoRA brings, else the default
        ones. Raises NotFoundError, FailedPreconditionError for an adapter of another base model,
        InvalidArgumentError for one of the wrong kind or named twice.
        """
        records = [self.lora(lora_id) for lora_id, _ in loras]
        heads = self._heads(medusa_id, records)
        return _stack(loras, records), heads

    def lora(self, lora_id: str) -> Record:
        """The record of a LoRA or bundle. Raises as `servable`; InvalidArgumentError for heads."""
        record = self._record(lora_id, "lora_id")
        if not record.manifest.facts.kind.has_lora:
            raise InvalidArgumentError(
                f"{lora_id!r} holds Medusa heads, not a LoRA; name it as medusa_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=lora_id,
            )
        return record

    def heads(self, medusa_id: str) -> HeadsUse:
        """The heads of an id. Raises as `servable`; InvalidArgumentError for a plain LoRA."""
        record = self._record(medusa_id, "medusa_id")
        if not record.manifest.facts.kind.has_heads:
            raise InvalidArgumentError(
                f"{medusa_id!r} holds a LoRA without Medusa heads; name it as lora_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=medusa_id,
            )
        return HeadsUse(medusa_id=medusa_id, digest=record.digest)

    @property
    def default_medusa(self) -> str:
        """The id of the server's default heads; "" if there are none."""
        if self._fixed_default == NO_HEADS:
            return ""
        return self._fixed_default or self._registry.default_medusa()

    def default_heads(self) -> HeadsUse | None:
        """The server's default heads as of now: an upload under their id changes them.

        Those of --medusa must be there. Those that the store remembers may have been made for
        another base model; then requests go without.
        """
        if self._fixed_default == NO_HEADS:
            return None
        if self._fixed_default:
            return self.heads(self._fixed_default)
        stored = self._registry.default_medusa()
        try:
            return self.heads(stored) if stored else None
        except LorastackError as error:
            logger.warning("no default heads: %s", error.message)
            return None

    def set_default_medusa(self, medusa_id: str) -> HeadsUse | None:
        """Makes heads the default, for good; "": none. Raises as `heads`, or if --medusa is set."""
        if self._fixed_default:
            raise FailedPreconditionError(
                f"the server was started with --medusa {self._fixed_default}, which wins; restart "
                "it without to choose default heads here",
                reason=Reason.DEFAULT_IS_FIXED,
                adapter_id=self._fixed_default,
            )
        heads = self.heads(medusa_id) if medusa_id else None
        self._registry.set_default_medusa(medusa_id)
        return heads

    def is_compatible(self, record: Record) -> bool:
        """True if the record was validated against the base model that this server runs."""
        return record.manifest.base_fingerprint == self._model.fingerprint

    def servable(self, adapter_id: str) -> Record:
        """Any adapter's record. Raises NotFoundError, DataLossError or FailedPreconditionError."""
        record = self._registry.resolve(adapter_id)
        if not self.is_compatible(record):
            raise FailedPreconditionError(
                f"{adapter_id!r} was stored for another base model than {self._model.name}, which "
                "this server runs; upload it again",
                reason=Reason.BASE_MODEL_DIFFERS,
                adapter_id=adapter_id,
            )
        return record

    def own_template(self, lora_id: str) -> str | None:
        """A LoRA's own chat template; None if the model's serves for it too.

        Raises as `lora`.
        """
        return self._templates.of(self.lora(lora_id).digest)

    def with_ids(self, error: LorastackError) -> LorastackError:
        """An error about pinned memory, told in ids, which callers know rather than digests.

        Any other error stays what it is.
        """
        if error.reason is not Reason.DEVICE_MEMORY_PINNED:
            return error
        digests = error.metadata["digests"].split(",")
        ids = {record.digest: record.id for record in self._registry.list()}
        names = ", ".join(sorted(ids.get(digest, digest) for digest in digests))
        return ResourceExhaustedError(
            f"{error.message} (pinned: {names})",
            reason=error.reason,
            adapter_ids=names,
            digests=error.metadata["digests"],
        )

    def _record(self, adapter_id: str, field: str) -> Record:
        if adapter_id in RESERVED_IDS:
            raise InvalidArgumentError(
                f"{adapter_id!r} is a reserved word, not an adapter; leave {field} empty for the "
                "default" + (f", or say {NO_HEADS!r} for no heads" if field == "medusa_id" else ""),
                field=field,
            )
        return self.servable(adapter_id)

    def _heads(self, medusa_id: str, records: list[Record]) -> HeadsUse | None:
        if medusa_id == NO_HEADS:
            return None
        if medusa_id:
            return self.heads(medusa_id)
        if len(records) == 1 and records[0].manifest.facts.kind.has_heads:
            return HeadsUse(medusa_id=records[0].id, digest=records[0].digest)
        return self.default_heads()


def _stack(loras: Sequence[tuple[str, float]], records: list[Record]) -> tuple[LoraUse, ...]:
    uses = [
        LoraUse(lora_id=lora_id, digest=record.digest, scale=scale)
        for (lora_id, scale), record in zip(loras, records, strict=True)
    ]
    by_digest: dict[str, LoraUse] = {}
    for use in uses:
        if (other := by_digest.setdefault(use.digest, use)) is not use:
            raise InvalidArgumentError(
                f"loras names the same adapter twice: {other.lora_id!r} and {use.lora_id!r}; "
                "name it once and add the scales",
                field="loras",
            )
    return tuple(by_digest[digest] for digest in sorted(by_digest))
