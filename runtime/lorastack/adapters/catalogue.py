"""The adapters that fit one base model: ids to digests, default heads, whose template is whose.

Look-ups read the registry's tables in memory. What touches files (`own_template`,
`set_default_medusa`) belongs into worker threads. Nothing here runs what an adapter brings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lorastack.adapters.formats.alias import Alias
from lorastack.adapters.store.ids import NO_HEADS, RESERVED_IDS, split_reference
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.adapters.templates import OwnTemplates
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.request import HeadsUse, LoraUse

logger = logging.getLogger(__name__)


class Templated(Protocol):
    """What is asked of a tokenizer."""

    @property
    def chat_template(self) -> str | None: ...


class BaseModel(Protocol):
    """What is asked of a base model: its name, and what tells it from others."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> Templated: ...


class Catalogue:
    """The registry as callers of one base model see it. Thread-safe; it keeps templates only."""

    def __init__(self, model: BaseModel, registry: Registry, fixed_default: str) -> None:
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

        An alias, alone in loras, stands for its own LoRAs and heads. Heads are those of medusa_id,
        else the alias', else those that the call's only LoRA brings, else the default ones. Raises
        NotFoundError, FailedPreconditionError for an adapter of another base model,
        InvalidArgumentError for one of the wrong kind or named twice; for what an alias names, and
        for the heads that a private part corrects, the message names both.
        """
        alias_id, alias = self._alias(loras)
        if alias is None:
            records = [self.lora(lora_id) for lora_id, _ in loras]
            return _stack(loras, records), self._heads(medusa_id, records)
        with _named_by(alias_id):
            records = [self.lora(lora_id) for lora_id, _ in alias.loras]
            stack = _stack(alias.loras, records)
            if alias.medusa_id and not medusa_id:
                return stack, self._named_heads(alias.medusa_id)
        return stack, self._heads(medusa_id, records)

    def check_alias(self, alias_id: str, alias: Alias) -> None:
        """Checks what an alias is about to be stored for: adapters that are here, of fitting kinds.

        Raises as `resolve` would if a request named it.
        """
        with _named_by(alias_id):
            if alias_id in {split_reference(reference)[0] for reference in alias.ids}:
                raise InvalidArgumentError(
                    "an alias cannot stand for itself; choose another id for it",
                    reason=Reason.INVALID_ADAPTER,
                )
            _stack(alias.loras, [self.lora(lora_id) for lora_id, _ in alias.loras])
            self._named_heads(alias.medusa_id)

    def lora(self, lora_id: str) -> Record:
        """The record of a LoRA or bundle. Raises as `servable`; InvalidArgumentError for others."""
        record = self._record(lora_id, "lora_id")
        check_no_alias(record, "no alias may be part of another selection")
        if not record.manifest.facts.kind.has_lora:
            raise InvalidArgumentError(
                f"{lora_id!r} holds Medusa heads, not a LoRA; name it as medusa_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=lora_id,
            )
        return record

    def heads(self, medusa_id: str) -> HeadsUse:
        """The heads of an id. Raises as `servable`; InvalidArgumentError for others than heads."""
        record = self._record(medusa_id, "medusa_id")
        check_no_alias(record, "name the heads themselves")
        if not record.manifest.facts.kind.has_heads:
            raise InvalidArgumentError(
                f"{medusa_id!r} holds a LoRA without Medusa heads; name it as lora_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=medusa_id,
            )
        return self._use(medusa_id, record)

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

    def holds_default(self, adapter_id: str) -> bool:
        """True if an id has the default heads, or the ones that they correct."""
        reference = self.default_medusa
        if not adapter_id or not reference:
            return False
        if adapter_id == split_reference(reference)[0]:
            return True
        try:
            return adapter_id == self.heads(reference).shared_id
        except LorastackError:
            return False

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

    def digests_of(self, record: Record) -> tuple[str, ...]:
        """Of all that serves a record: its own, before it that of the heads that it corrects.

        Raises NotFoundError for such heads that are gone.
        """
        if not record.manifest.facts.kind.has_heads:
            return (record.digest,)
        return self._use(record.id, record).digests

    def own_template(self, lora_id: str) -> str | None:
        """The own chat template of a LoRA, or of an alias' only one; None if the model's serves.

        Raises as `resolve`.
        """
        stack, _ = self.resolve(((lora_id, 1.0),), NO_HEADS)
        return self._templates.of(stack[0].digest) if len(stack) == 1 else None

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

    def _alias(self, loras: Sequence[tuple[str, float]]) -> tuple[str, Alias | None]:
        """The alias that a call names in place of LoRAs; ("", None) if it names none.

        Raises InvalidArgumentError for one among others or with a scale, and as `servable`.
        """
        for lora_id, scale in loras:
            alias = self._record(lora_id, "lora_id").manifest.facts.alias
            if alias is None:
                continue
            if len(loras) > 1 or scale != 1.0:
                raise InvalidArgumentError(
                    f"{lora_id!r} is an alias, a whole selection with its own scales: put it as "
                    "lora_id, alone, or name its parts in loras",
                    reason=Reason.WRONG_ADAPTER_KIND,
                    adapter_id=lora_id,
                )
            return lora_id, alias
        return "", None

    def _heads(self, medusa_id: str, records: list[Record]) -> HeadsUse | None:
        """The heads of a call. records: its LoRAs'."""
        if not medusa_id:
            return self._brought(records) or self.default_heads()
        if medusa_id == NO_HEADS:
            return None
        alias = self._record(medusa_id, "medusa_id").manifest.facts.alias
        return self.heads(medusa_id) if alias is None else self._heads_of_alias(medusa_id, alias)

    def _heads_of_alias(self, alias_id: str, alias: Alias) -> HeadsUse:
        """Those that a call gets by naming an alias as medusa_id."""
        with _named_by(alias_id):
            heads = self._named_heads(alias.medusa_id)
            if heads is None and not alias.medusa_id:
                heads = self._brought([self.lora(lora_id) for lora_id, _ in alias.loras])
        if heads is None:
            raise InvalidArgumentError(
                f"the alias {alias_id!r} names no Medusa heads; name it as lora_id",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=alias_id,
            )
        return heads

    def _named_heads(self, medusa_id: str) -> HeadsUse | None:
        return None if medusa_id in ("", NO_HEADS) else self.heads(medusa_id)

    def _brought(self, records: Sequence[Record]) -> HeadsUse | None:
        """The heads that a selection's only LoRA brings."""
        if len(records) == 1 and records[0].manifest.facts.kind.has_heads:
            return self._use(records[0].id, records[0])
        return None

    def _use(self, medusa_id: str, record: Record) -> HeadsUse:
        """The heads of a record: whole ones, or a private part and the ones that it corrects."""
        facts = record.manifest.facts
        if facts.shared_heads is None:
            return HeadsUse(medusa_id=medusa_id, digest=record.digest, prior=facts.acceptance)
        try:
            shared = self._registry.shared_heads(
                facts.shared_heads, record.manifest.base_fingerprint
            )
        except NotFoundError as error:
            raise NotFoundError(
                f"{medusa_id!r} is a private part of other heads: {error.message}",
                reason=error.reason,
                **{**error.metadata, "private_id": medusa_id},
            ) from None
        return HeadsUse(
            medusa_id=medusa_id,
            digest=record.digest,
            shared_id=shared.id,
            shared_digest=shared.digest,
            prior=facts.acceptance or shared.manifest.facts.acceptance,
        )


def check_no_alias(record: Record, remedy: str) -> None:
    """Raises InvalidArgumentError that names what an alias stands for. remedy: what to do."""
    if (alias := record.manifest.facts.alias) is not None:
        raise InvalidArgumentError(
            f"{record.id!r} is an alias of {', '.join(alias.ids)}: {remedy}",
            reason=Reason.WRONG_ADAPTER_KIND,
            adapter_id=record.id,
        )


@contextmanager
def _named_by(alias_id: str) -> Iterator[None]:
    """Errors about what an alias names name the alias as well."""
    try:
        yield
    except LorastackError as error:
        raise type(error)(
            f"alias {alias_id!r}: {error.message}",
            reason=error.reason,
            **{**error.metadata, "alias_id": alias_id},
        ) from None


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
