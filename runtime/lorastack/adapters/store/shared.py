"""Which stored heads the private part of another adapter corrects.

Its config names an id and the sha256 of those heads' weights. The sha256 alone decides: the id may
have other heads by now, for which the correction would be noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from lorastack.adapters.formats.facts import SharedHeads
from lorastack.adapters.store.manifest import Manifest, Pointer, Record
from lorastack.adapters.store.tables import Tables
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from lorastack.folders import HEADS_WEIGHTS


def shared_heads(tables: Tables, shared: SharedHeads, base_fingerprint: str) -> Record:
    """The heads that a private part corrects, in whatever revision has their weights.

    Of the id that the part names if it has them, else of any other. Raises NotFoundError if no
    revision that was stored for this base model has them.
    """
    for pointer in _by_likelihood(tables, shared.id):
        for revision in reversed(pointer.revisions):
            manifest = tables.manifests.get(revision.digest)
            if manifest is not None and _serves(manifest, shared, base_fingerprint):
                return tables.record(pointer.id, revision)
    raise NotFoundError(
        f"no heads {shared.id!r} whose {HEADS_WEIGHTS} has the sha256 {shared.sha256}: upload "
        "them again, under any id",
        adapter_id=shared.id,
    )


def check_shared_heads(tables: Tables, manifest: Manifest) -> None:
    """Checks an adapter that is about to be stored; whole heads and LoRAs pass.

    Raises FailedPreconditionError if it is a private part of heads that are not stored, and
    InvalidArgumentError if they have other blocks than it corrects.
    """
    facts, shared = manifest.facts, manifest.facts.shared_heads
    if shared is None:
        return
    try:
        record = shared_heads(tables, shared, manifest.base_fingerprint)
    except NotFoundError:
        raise FailedPreconditionError(
            f"it is a private part of the heads {shared.id!r}, and the store has no whole heads "
            f"for this base model whose {HEADS_WEIGHTS} has the sha256 {shared.sha256}: upload "
            f"{shared.id!r} first, the very ones that the part was trained on",
            reason=Reason.SHARED_HEADS_MISSING,
            adapter_id=shared.id,
            sha256=shared.sha256,
        ) from None
    whole = record.manifest.facts
    found, wanted = (whole.num_heads, whole.num_layers), (facts.num_heads, facts.num_layers)
    if whole.medusa_version != 2:
        raise InvalidArgumentError(
            f"it is a private part of {record.id!r}, which are version 1 heads: private parts go "
            "with version 2 heads only",
            reason=Reason.UNSUPPORTED_ADAPTER,
        )
    if found != wanted:
        raise InvalidArgumentError(
            f"it is a private part of {record.id!r}, which has {found[0]} heads of {found[1]} "
            f"blocks, but its config says {wanted[0]} of {wanted[1]}",
            reason=Reason.INVALID_ADAPTER,
        )


def digests_of(tables: Tables, record: Record) -> set[str]:
    """The digests that a request gets by naming a record: its own and of heads that it corrects."""
    return {record.digest, *_corrected(tables, [record.manifest])}


def corrected_digests(tables: Tables) -> set[str]:
    """The digests of all heads that a stored private part corrects."""
    return set(_corrected(tables, tables.manifests.values()))


def _corrected(tables: Tables, manifests: Iterable[Manifest]) -> Iterator[str]:
    """The digests of the heads that these adapters correct, of those that are there."""
    for manifest in manifests:
        if (shared := manifest.facts.shared_heads) is not None:
            with suppress(NotFoundError):
                yield shared_heads(tables, shared, manifest.base_fingerprint).digest


def _by_likelihood(tables: Tables, adapter_id: str) -> Iterator[Pointer]:
    """This id's pointer, and then those of all other ids."""
    if (known := tables.pointers.get(adapter_id)) is not None:
        yield known
    for other, pointer in sorted(tables.pointers.items()):
        if other != adapter_id:
            yield pointer


def _serves(manifest: Manifest, shared: SharedHeads, base_fingerprint: str) -> bool:
    """True for the whole heads that a private part names, stored for this base model."""
    return (
        manifest.base_fingerprint == base_fingerprint
        and manifest.facts.kind.has_heads
        and manifest.facts.shared_heads is None
        and any(
            spec.name == HEADS_WEIGHTS and spec.sha256 == shared.sha256 for spec in manifest.files
        )
    )
