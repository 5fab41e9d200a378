"""Which old revisions stay."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace

from lorastack.adapters.store.manifest import Pointer
from lorastack.adapters.store.tables import Tables
from lorastack.errors import DataLossError, NotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What went with old revisions. digests: those that no id has any more."""

    num_revisions: int
    num_bytes: int  # of the disk
    digests: frozenset[str]


def shortened(
    tables: Tables, keep: int, adapter_id: str, in_use: Collection[str]
) -> dict[str, Pointer]:
    """The pointers that lose revisions, by id: an id's, or "" for those of all ids.

    keep: how many revisions an id has at most, at least 1. in_use: digests that stay whatever
    their number, as the default heads do. Raises NotFoundError or DataLossError.
    """
    needed = {*in_use}
    with suppress(NotFoundError, DataLossError):
        needed.add(tables.resolve(tables.default_medusa).digest)
    if adapter_id:
        tables.resolve(adapter_id)
    known = [tables.pointers[adapter_id]] if adapter_id else tables.pointers.values()
    return {
        pointer.id: shorter
        for pointer in known
        if len((shorter := _keeping(pointer, keep, needed)).revisions) < len(pointer.revisions)
    }


def num_revisions(tables: Tables) -> int:
    """Of all ids."""
    return sum(len(pointer.revisions) for pointer in tables.pointers.values())


def _keeping(pointer: Pointer, keep: int, needed: Collection[str]) -> Pointer:
    """With at most so many revisions, the newest ones, and beside them those of needed digests.

    A content that is there once more, further on, goes first: nobody loses anything by that.
    """
    keep = max(keep, 1)
    last = {revision.digest: revision for revision in pointer.revisions}
    repeated = [old.revision for old in pointer.revisions if last[old.digest] is not old]
    dropped = set(repeated[: max(len(pointer.revisions) - keep, 0)])
    left = [known for known in pointer.revisions if known.revision not in dropped]
    kept = [old for old in left[:-keep] if old.digest in needed] + left[-keep:]
    return replace(pointer, revisions=tuple(kept))
