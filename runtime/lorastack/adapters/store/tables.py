"""What a store's small files say, in memory."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lorastack.adapters.store.ids import file_name, is_digest, split_reference
from lorastack.adapters.store.manifest import FileSpec, Manifest, Pointer, Record, Revision
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
)

MIN_DIGITS = 8  # of a digest's start: fewer may be another revision's by chance
_DIGITS = re.compile(rf"[0-9a-f]{{{MIN_DIGITS},64}}")


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The store at one moment. Never changed: after a change another one takes its place.

    So look-ups need no lock. The last three fields are derived from the others, and carried over
    where that is cheap: with thousands of adapters, deriving them at every upload would hold the
    interpreter's lock.
    """

    pointers: Mapping[str, Pointer]  # by id
    manifests: Mapping[str, Manifest]  # by digest
    damaged_pointers: frozenset[str]  # names of files that cannot be read
    damaged_manifests: frozenset[str]
    default_medusa: str  # "" if none
    # The newest revision of every id, sorted by id, without ids whose newest manifest is damaged:
    # they cannot be served.
    newest: tuple[Record, ...]
    digests: frozenset[str]  # of all revisions of all ids
    blobs: Mapping[str, int]  # sha256 -> size of every file of these revisions

    @classmethod
    def of(
        cls,
        *,
        pointers: Mapping[str, Pointer],
        manifests: Mapping[str, Manifest],
        damaged_pointers: frozenset[str],
        damaged_manifests: frozenset[str],
        default_medusa: str,
    ) -> Tables:
        """Tables with all derived fields."""
        digests = _digests(pointers)
        return cls(
            pointers=pointers,
            manifests=manifests,
            damaged_pointers=damaged_pointers,
            damaged_manifests=damaged_manifests,
            default_medusa=default_medusa,
            newest=tuple(
                _record(pointer.id, pointer.newest, manifest)
                for _, pointer in sorted(pointers.items())
                if (manifest := manifests.get(pointer.newest.digest)) is not None
            ),
            digests=digests,
            blobs=_blobs(pointers, manifests),
        )

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the files that cannot be read."""
        return tuple(sorted(self.damaged_pointers | self.damaged_manifests))

    def has_pointer(self, adapter_id: str) -> bool:
        """True if the id has a pointer, be it damaged."""
        return adapter_id in self.pointers or file_name(adapter_id) in self.damaged_pointers

    def starting_with(self, prefix: str) -> list[Record]:
        """The records of `newest` whose id starts with the prefix."""
        first = bisect_left(self.newest, prefix, key=lambda record: record.id)
        # Every character of an id sorts before \x7f.
        last = bisect_left(self.newest, prefix + "\x7f", key=lambda record: record.id)
        return list(self.newest[first:last])

    def resolve(self, reference: str) -> Record:
        """The newest revision of an id, or the one that `id@sha256:...` names.

        Raises NotFoundError naming it; DataLossError if its pointer or manifest is damaged.
        """
        adapter_id, digest = split_reference(reference)
        pointer = self.known_pointer(adapter_id, reference)
        for revision in reversed(pointer.revisions):
            if digest is None or revision.digest == digest:
                return self.record(adapter_id, revision)
        raise _no_revision(adapter_id, reference)

    def find(self, adapter_id: str, start: str) -> Record:
        """The revision of an id whose digest has this start, given with or without "sha256:".

        Raises InvalidArgumentError for a start that is too short or fits several, and as `resolve`.
        """
        digits = start.removeprefix("sha256:")
        if not _DIGITS.fullmatch(digits):
            raise InvalidArgumentError(
                f"{start[:80]!r} is not a digest: write sha256: and its 64 digits, or at least the "
                f"first {MIN_DIGITS}; `lorastack adapters revisions {adapter_id[:300]}` lists them",
                field="digest",
            )
        pointer = self.known_pointer(adapter_id)
        fitting = {
            revision.digest: revision
            for revision in pointer.revisions
            if revision.digest.startswith(f"sha256:{digits}")
        }
        if not fitting:
            raise _no_revision(adapter_id, f"{adapter_id}@{start}")
        if len(fitting) > 1:
            raise InvalidArgumentError(
                f"{start!r} fits {len(fitting)} revisions of {adapter_id!r}: write more digits",
                field="digest",
            )
        return self.record(adapter_id, *fitting.values())

    def revisions(self, adapter_id: str) -> list[Record]:
        """All revisions of an id, newest first; without those whose manifest is damaged.

        Raises NotFoundError, or DataLossError if the pointer is damaged.
        """
        return [
            self.record(adapter_id, revision)
            for revision in reversed(self.known_pointer(adapter_id).revisions)
            if revision.digest in self.manifests
        ]

    def record(self, adapter_id: str, revision: Revision) -> Record:
        """A revision with its manifest. Raises DataLossError if that is damaged."""
        manifest = self.manifests.get(revision.digest)
        if manifest is None:
            raise DataLossError(
                f"the store's manifest of adapter {adapter_id!r} is damaged: upload it again",
                adapter_id=adapter_id,
                digest=revision.digest,
            )
        return _record(adapter_id, revision, manifest)

    def manifest(self, digest: str) -> Manifest:
        """What is known about a digest. Raises NotFoundError."""
        manifest = self.manifests.get(digest)
        if manifest is None:
            raise NotFoundError(f"no adapter with digest {digest}: it was deleted", digest=digest)
        return manifest

    def check_condition(self, adapter_id: str, if_digest: str | None) -> None:
        """Checks an upload's if_digest: "" if the id must be new, a digest if it must point there.

        Raises InvalidArgumentError, AlreadyExistsError or AbortedError.
        """
        if if_digest and not is_digest(if_digest):
            raise InvalidArgumentError(
                f"if_digest {if_digest[:80]!r} is not sha256:<64 hex digits>"
            )
        pointer = self.pointers.get(adapter_id)
        if if_digest is None:
            return
        if if_digest == "":
            if pointer is not None:
                raise AlreadyExistsError(
                    f"adapter {adapter_id!r} exists already: choose another id, or upload a new "
                    "revision of it",
                    adapter_id=adapter_id,
                )
        elif pointer is None or pointer.newest.digest != if_digest:
            raise AbortedError(
                f"adapter {adapter_id!r} no longer points to {if_digest}: look at it again",
                adapter_id=adapter_id,
                digest=pointer.newest.digest if pointer else "",
            )

    def with_manifest(self, manifest: Manifest) -> Tables:
        """With this manifest, of a new digest or in the place of an older one."""
        if self.manifests.get(manifest.digest) == manifest:
            return self
        manifests = {**self.manifests, manifest.digest: manifest}
        damaged_manifests = self.damaged_manifests - {manifest_name(manifest.digest)}
        if manifest.digest not in self.digests:
            return replace(self, manifests=manifests, damaged_manifests=damaged_manifests)
        return Tables.of(
            pointers=self.pointers,
            manifests=manifests,
            damaged_pointers=self.damaged_pointers,
            damaged_manifests=damaged_manifests,
            default_medusa=self.default_medusa,
        )

    def with_pointer(self, pointer: Pointer) -> Tables:
        """With this pointer, whose newest revision is new or changed, and has a manifest."""
        newest = self.record(pointer.id, pointer.newest)
        pointers = {**self.pointers, pointer.id: pointer}
        blobs = {**self.blobs, **{spec.sha256: spec.size for spec in newest.files}}
        known = self.pointers.get(pointer.id)
        if known is not None and len(known.revisions) == len(pointer.revisions):
            blobs = _blobs(pointers, self.manifests)  # the changed revision may lack a file now
        return replace(
            self,
            pointers=pointers,
            damaged_pointers=self.damaged_pointers - {file_name(pointer.id)},
            newest=self._newest(pointer.id, newest),
            digests=self.digests | {newest.digest},
            blobs=blobs,
        )

    def without_pointer(self, adapter_id: str) -> Tables:
        """Without this id, whose pointer may be damaged."""
        pointers = {known: p for known, p in self.pointers.items() if known != adapter_id}
        digests = _digests(pointers)
        return replace(
            self,
            pointers=pointers,
            damaged_pointers=self.damaged_pointers - {file_name(adapter_id)},
            newest=self._newest(adapter_id),
            digests=digests,
            blobs=_blobs(pointers, self.manifests),
        )

    def with_fewer_revisions(self, shorter: Mapping[str, Pointer]) -> Tables:
        """With these pointers, by id, that lost some of their older revisions."""
        if not shorter:
            return self
        pointers = {**self.pointers, **shorter}
        return replace(
            self,
            pointers=pointers,
            digests=_digests(pointers),
            blobs=_blobs(pointers, self.manifests),
        )

    def with_manifests_of(self, digests: Collection[str]) -> Tables:
        """With the manifests of these digests alone."""
        names = {manifest_name(digest) for digest in digests}
        return replace(
            self,
            manifests={digest: m for digest, m in self.manifests.items() if digest in digests},
            damaged_manifests=self.damaged_manifests & names,
        )

    def with_default_medusa(self, reference: str) -> Tables:
        """With this reference of the default heads; "" for none."""
        return replace(self, default_medusa=reference)

    def files(self, revision: Revision) -> tuple[FileSpec, ...]:
        """The revision's files, without the ones of a damaged manifest."""
        return _files(revision, self.manifests)

    def stored_blobs(self) -> set[str]:
        """sha256 of every file of every manifest and revision."""
        of_manifests = (spec for m in self.manifests.values() for spec in m.files)
        return {spec.sha256 for spec in of_manifests} | self.blobs.keys()

    def manifest_names(self) -> set[str]:
        """Names of the manifests' files, damaged ones too."""
        return {manifest_name(digest) for digest in self.manifests} | self.damaged_manifests

    def _newest(self, adapter_id: str, *record: Record) -> tuple[Record, ...]:
        """`newest` with this record for the id; without a record, without the id."""
        first = bisect_left(self.newest, adapter_id, key=lambda known: known.id)
        last = bisect_right(self.newest, adapter_id, key=lambda known: known.id)
        return (*self.newest[:first], *record, *self.newest[last:])

    def known_pointer(self, adapter_id: str, reference: str = "") -> Pointer:
        """The pointer of a plain id; reference: what an error calls it instead.

        Raises NotFoundError, or DataLossError if the pointer is damaged.
        """
        pointer = self.pointers.get(adapter_id)
        if pointer is not None:
            return pointer
        if file_name(adapter_id) in self.damaged_pointers:
            raise DataLossError(
                f"the store's record of adapter {adapter_id!r} is damaged: upload it again",
                adapter_id=adapter_id,
            )
        raise no_adapter(reference or adapter_id)


def no_adapter(reference: str) -> NotFoundError:
    """The error for an id that has no pointer."""
    return NotFoundError(
        f"no adapter {reference[:300]!r}: `lorastack adapters list` shows the stored ones",
        adapter_id=reference[:300],
    )


def _no_revision(adapter_id: str, reference: str) -> NotFoundError:
    return NotFoundError(
        f"no adapter {reference[:300]!r}: `lorastack adapters revisions {adapter_id}` lists the "
        "revisions that there are",
        adapter_id=reference[:300],
    )


def _digests(pointers: Mapping[str, Pointer]) -> frozenset[str]:
    return frozenset(r.digest for pointer in pointers.values() for r in pointer.revisions)


def _blobs(pointers: Mapping[str, Pointer], manifests: Mapping[str, Manifest]) -> dict[str, int]:
    revisions = (revision for pointer in pointers.values() for revision in pointer.revisions)
    return {spec.sha256: spec.size for r in revisions for spec in _files(r, manifests)}


def _files(revision: Revision, manifests: Mapping[str, Manifest]) -> tuple[FileSpec, ...]:
    manifest = manifests.get(revision.digest)
    return revision.other_files if manifest is None else manifest.files + revision.other_files


def manifest_name(digest: str) -> str:
    """The file that a digest's manifest is stored in."""
    return digest.removeprefix("sha256:") + ".json"


def _record(adapter_id: str, revision: Revision, manifest: Manifest) -> Record:
    return Record(
        id=adapter_id,
        revision=revision.revision,
        created_at=revision.created_at,
        manifest=manifest,
        other_files=revision.other_files,
    )
