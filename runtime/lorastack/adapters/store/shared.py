"""Which stored heads the private part of another adapter corrects.

Its config names an id and the sha256 of those heads' weights. The sha256 alone decides: the id may
have other heads by now, for which the correction would be noise.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def shared_heads(tables: Tables, part: Manifest) -> Record:
    """The heads that a private part corrects, in whatever revision has their weights.

    Of the id that the part names if it has them, else of any other. Raises NotFoundError if no
    revision that was stored for the part's base model has them.
    """
    shared = _named(part)
    for pointer in _by_likelihood(tables, shared.id):
        for revision in reversed(pointer.revisions):
            manifest = tables.manifests.get(revision.digest)
            if manifest is not None and _serves(manifest, part):
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
    facts = manifest.facts
    if facts.shared_heads is None:
        return
    try:
        record = shared_heads(tables, manifest)
    except NotFoundError:
        shared = facts.shared_heads
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
    digests = {record.digest}
    if record.manifest.facts.shared_heads is not None:
        with suppress(NotFoundError):
            digests.add(shared_heads(tables, record.manifest).digest)
    return digests


def corrected_digests(tables: Tables) -> set[str]:
    """The digests of all heads that a stored private part corrects."""
    found: set[str] = set()
    for manifest in tables.manifests.values():
        if manifest.facts.shared_heads is not None:
            with suppress(NotFoundError):
                found.add(shared_heads(tables, manifest).digest)
    return found


def _by_likelihood(tables: Tables, adapter_id: str) -> Iterator[Pointer]:
    """This id's pointer, and then those of all other ids."""
    if (known := tables.pointers.get(adapter_id)) is not None:
        yield known
    for other, pointer in sorted(tables.pointers.items()):
        if other != adapter_id:
            yield pointer


def _named(part: Manifest) -> SharedHeads:
    assert part.facts.shared_heads is not None, part.digest
    return part.facts.shared_heads


def _serves(manifest: Manifest, part: Manifest) -> bool:
    """True for the whole heads that a part names, stored for the same base model."""
    sha256 = _named(part).sha256
    return (
        manifest.base_fingerprint == part.base_fingerprint
        and manifest.facts.kind.has_heads
        and manifest.facts.shared_heads is None
        and any(spec.name == HEADS_WEIGHTS and spec.sha256 == sha256 for spec in manifest.files)
    )
