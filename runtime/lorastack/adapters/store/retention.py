"""Which old revisions stay."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace

from lorastack.adapters.store.ids import split_reference
from lorastack.adapters.store.manifest import Pointer
from lorastack.adapters.store.shared import corrected_digests
from lorastack.adapters.store.tables import Tables
from lorastack.errors import DataLossError, NotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was removed with old revisions. digests: the ones that no id has any more."""

    num_revisions: int
    num_bytes: int  # freed on the disk
    digests: frozenset[str]


def shortened(
    tables: Tables, keep: int, adapter_id: str, in_use: Collection[str]
) -> dict[str, Pointer]:
    """The shorter pointers, by id, of the ids that lose revisions.

    keep: how many revisions an id keeps, at least 1; more if their digests are in_use, the
    default heads', named by an alias (`id@sha256:...`) or those of heads that a private part
    corrects. adapter_id: a plain id, "" for all.
    Raises NotFoundError or DataLossError.
    """
    needed = {*in_use}
    with suppress(NotFoundError, DataLossError):
        needed.add(tables.resolve(tables.default_medusa).digest)
    needed |= _named_by_aliases(tables) | corrected_digests(tables)
    known: Collection[Pointer] = tables.pointers.values()
    if adapter_id:
        known = [tables.known_pointer(adapter_id)]
        tables.record(adapter_id, known[0].newest)  # raises if only older revisions can be served
    return {
        pointer.id: shorter
        for pointer in known
        if len((shorter := _keeping(pointer, keep, needed)).revisions) < len(pointer.revisions)
    }


def _named_by_aliases(tables: Tables) -> set[str]:
    """The digests of the revisions that the newest revision of an alias names."""
    aliases = (record.manifest.facts.alias for record in tables.newest)
    references = (split_reference(name) for alias in aliases if alias for name in alias.ids)
    return {digest for _, digest in references if digest is not None}


def num_revisions(tables: Tables) -> int:
    """The number of revisions of all ids."""
    return sum(len(pointer.revisions) for pointer in tables.pointers.values())


def _keeping(pointer: Pointer, keep: int, needed: Collection[str]) -> Pointer:
    """The pointer with its `keep` newest revisions, and the older ones of needed digests.

    Revisions whose content comes again further on go first: nobody loses anything by that.
    """
    keep = max(keep, 1)
    last = {revision.digest: revision for revision in pointer.revisions}
    repeated = [old.revision for old in pointer.revisions if last[old.digest] is not old]
    dropped = set(repeated[: max(len(pointer.revisions) - keep, 0)])
    left = [known for known in pointer.revisions if known.revision not in dropped]
    kept = [old for old in left[:-keep] if old.digest in needed] + left[-keep:]
    return replace(pointer, revisions=tuple(kept))
