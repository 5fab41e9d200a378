"""AdapterService's messages out of what the store and the engine know, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorastack.adapters.memory.stats import AdapterStats
from lorastack.adapters.store.manifest import FileSpec, Record
from lorastack.layout import AdapterKind
from lorastack.printable import printable
from lorastack.service.edge import limits
from lorastack.v1 import adapters_pb2

_KINDS = {
    AdapterKind.LORA: adapters_pb2.Adapter.LORA,
    AdapterKind.MEDUSA: adapters_pb2.Adapter.MEDUSA,
    AdapterKind.LORA_WITH_MEDUSA: adapters_pb2.Adapter.LORA_WITH_MEDUSA,
    AdapterKind.ALIAS: adapters_pb2.Adapter.ALIAS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUsage:
    """Where adapters are and who uses them, at one moment. Keys: digests."""

    on_device: Mapping[str, AdapterStats]
    on_host: Collection[str]
    in_flight: Mapping[str, int]  # requests that have not ended
    last_used: Mapping[str, float]  # seconds since the epoch


def file_specs(
    messages: Sequence[adapters_pb2.FileSpec], field: str, max_files: int
) -> list[FileSpec]:
    """The files of an upload, as announced; the registry checks them."""
    limits.check_length(messages, field, max_files)
    return [FileSpec(name=m.name, size=m.size, sha256=m.sha256) for m in messages]


def needed_blobs(needed: Iterable[tuple[FileSpec, int]]) -> adapters_pb2.PlanUploadResponse:
    """What an upload has to bring: blobs, each from the first byte that is not staged."""
    blobs = [adapters_pb2.NeededBlob(sha256=spec.sha256, offset=offset) for spec, offset in needed]
    return adapters_pb2.PlanUploadResponse(needed=blobs)


def adapter(record: Record, *, compatible: bool, usage: AdapterUsage) -> adapters_pb2.Adapter:
    """An adapter as the API shows it."""
    facts, digest = record.manifest.facts, record.digest
    seconds = int(record.created_at)
    message = adapters_pb2.Adapter(
        id=record.id,
        digest=digest,
        revision=record.revision,
        kind=_KINDS[facts.kind],
        base_model=printable(facts.base_model),  # whatever the adapter's author wrote
        compatible=compatible,
        rank=facts.rank,
        alpha=facts.alpha,
        target_modules=facts.target_modules,
        num_heads=facts.num_heads,
        num_layers=facts.num_layers,
        medusa_version=facts.medusa_version,
        warnings=facts.warnings,
        size_bytes=record.size_bytes,
        # A mapping: making a Timestamp takes a third of a listing's time.
        created_at={"seconds": seconds, "nanos": int((record.created_at - seconds) * 1e9)},
        residency=adapters_pb2.Adapter.DISK,
        in_flight=usage.in_flight.get(digest, 0),
    )
    if (shared := facts.shared_heads) is not None:
        message.shared_heads_id, message.shared_heads_sha256 = shared.id, shared.sha256
        message.private_rank = facts.private_rank
    if (alias := facts.alias) is not None:
        message.alias_medusa_id = alias.medusa_id
        for lora_id, scale in alias.loras:
            message.alias_loras.add(lora_id=lora_id, scale=scale)
    if (last_used := usage.last_used.get(digest)) is not None:
        message.last_used_at.FromMicroseconds(int(last_used * 1e6))
    if (device := usage.on_device.get(digest)) is not None:
        message.residency = adapters_pb2.Adapter.DEVICE
        message.device_bytes, message.pinned = device.nbytes, device.pinned
    elif digest in usage.on_host:
        message.residency = adapters_pb2.Adapter.HOST
    return message
