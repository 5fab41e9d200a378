"""The adapter store on disk: ids, their revisions, and the files behind them.

`manifest` describes the layout. One process owns a store. All calls block on the disk, so an event
loop runs them in threads; any thread may call anything.
"""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from lorastack.adapters.blobs import BlobStore, Staging
from lorastack.adapters.durable import disk_full_is_exhaustion, replace_file, sync_folder
from lorastack.adapters.ids import check_id, file_name, is_digest, split_reference
from lorastack.adapters.manifest import FileSpec, Manifest, Pointer, Record, Revision, check_files
from lorastack.adapters.opening import (
    clear_staging,
    lock_store,
    manifest_name,
    prepare_store,
    read_tables,
)
from lorastack.adapters.upload import Upload, Validate
from lorastack.config import GIB
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
)

__all__ = ["Record", "Recovery", "Registry", "Upload", "Validate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What opening a store did and found."""

    removed_uploads: int  # unfinished ones
    removed_manifests: int
    removed_blobs: int
    damaged: tuple[str, ...]  # pointer and manifest files that cannot be read


class Registry:
    """Adapter ids, their immutable digests, and the bytes behind them."""

    def __init__(self, root: Path, *, max_upload: int = 4 * GIB, max_files: int = 64) -> None:
        """Opens or creates the store. max_upload: bytes of all files of one adapter.

        Raises FailedPreconditionError if another process has it or another version wrote it.
        """
        self._root = root
        self._max_upload = max_upload
        self._max_files = max_files
        root.mkdir(parents=True, exist_ok=True)
        self.close = weakref.finalize(self, os.close, lock_store(root))
        prepare_store(root)
        self._blobs = BlobStore(root / "blobs" / "sha256")
        # Mutators hold _writing for their disk work; _lock guards the tables for moments only, so
        # that resolving an id never waits for a disk.
        self._writing = Lock()
        self._lock = Lock()
        self._uploads: set[Upload] = set()
        removed_uploads = clear_staging(root)
        self._tables = read_tables(root)
        damaged = self._tables.damaged_pointers | self._tables.damaged_manifests
        removed_manifests, removed_blobs = self._collect(())
        self.recovery = Recovery(
            removed_uploads=removed_uploads,
            removed_manifests=removed_manifests,
            removed_blobs=removed_blobs,
            damaged=tuple(sorted(damaged)),
        )

    def resolve(self, reference: str) -> Record:
        """The newest revision of an id, or the one that `id@sha256:...` names.

        Raises NotFoundError naming it; DataLossError if its pointer or manifest is damaged.
        """
        adapter_id, digest = split_reference(reference)
        with self._lock:
            pointer = self._tables.pointers.get(adapter_id)
            damaged = pointer is None and file_name(adapter_id) in self._tables.damaged_pointers
        if damaged:
            raise DataLossError(
                f"the store's record of adapter {adapter_id!r} is damaged: upload it again",
                adapter_id=adapter_id,
            )
        for revision in reversed(pointer.revisions) if pointer else ():
            if digest is None or revision.digest == digest:
                return self._record(adapter_id, revision)
        raise NotFoundError(
            f"no adapter {reference[:300]!r}: `lorastack adapters list` shows the stored ones",
            adapter_id=reference[:300],
        )

    def manifest(self, digest: str) -> Manifest:
        """What is known about a digest. Raises NotFoundError."""
        with self._lock:
            manifest = self._tables.manifests.get(digest)
        if manifest is None:
            raise NotFoundError(f"no adapter with digest {digest}: it was deleted", digest=digest)
        return manifest

    def list(self, prefix: str = "") -> list[Record]:
        """The newest revision of every id that starts with the prefix, sorted by id.

        Ids whose newest manifest is damaged are left out: they cannot be served.
        """
        with self._lock:
            found = [
                Record(
                    id=pointer.id,
                    revision=pointer.newest.revision,
                    created_at=pointer.newest.created_at,
                    manifest=self._tables.manifests[pointer.newest.digest],
                )
                for pointer in self._tables.pointers.values()
                if pointer.id.startswith(prefix) and pointer.newest.digest in self._tables.manifests
            ]
        return sorted(found, key=lambda record: record.id)

    def files(self, digest: str) -> dict[str, Path]:
        """File name -> path of its bytes. Raises NotFoundError."""
        return {spec.name: self._blobs.path(spec.sha256) for spec in self.manifest(digest).files}

    def verify(self, digest: str) -> None:
        """Reads every byte of an adapter.

        Raises DataLossError naming what is damaged; NotFoundError if it is deleted meanwhile.
        """
        for spec in self.manifest(digest).files:
            try:
                self._blobs.check(spec, digest)
            except DataLossError:
                with self._writing:  # no deletion or upload runs: now it is damage, or it is gone
                    self.manifest(digest)
                    self._blobs.check(spec, digest)

    def missing(self, files: Sequence[FileSpec]) -> tuple[FileSpec, ...]:
        """Those of the files whose bytes the store needs. Raises InvalidArgumentError."""
        check_files(files, max_files=self._max_files, max_bytes=self._max_upload)
        unique = {spec.sha256: spec for spec in files}
        return tuple(spec for spec in unique.values() if not self._blobs.has(spec.sha256))

    def begin_upload(
        self, adapter_id: str, files: Sequence[FileSpec], if_digest: str | None = None
    ) -> Upload:
        """Starts an upload. if_digest: see `_check_condition`.

        Raises InvalidArgumentError, AlreadyExistsError or AbortedError. The caller ends it with
        `commit` or `abort`.
        """
        check_id(adapter_id)
        if if_digest and not is_digest(if_digest):
            raise InvalidArgumentError(
                f"if_digest {if_digest[:80]!r} is not sha256:<64 hex digits>"
            )
        with self._lock:
            self._check_condition(adapter_id, if_digest)
        with self._writing, disk_full_is_exhaustion():
            needed = self.missing(files)
            staging = Staging(self._root / "staging" / uuid.uuid4().hex, needed)
            upload = Upload(
                adapter_id=adapter_id,
                files=tuple(files),
                if_digest=if_digest,
                staging=staging,
                blobs=self._blobs,
                publish=self._publish,
                forget=self._forget,
            )
            self._uploads.add(upload)
        return upload

    def delete(self, adapter_id: str, *, in_use: Collection[str] = ()) -> None:
        """Removes an id with all its revisions, and the bytes that nothing else needs.

        in_use: digests that running rows may load once more; they go at a later call or start.
        Raises NotFoundError.
        """
        with self._writing:
            with self._lock:
                name = file_name(adapter_id)
                known = adapter_id in self._tables.pointers
                if not known and name not in self._tables.damaged_pointers:
                    raise NotFoundError(f"no adapter {adapter_id[:300]!r}", adapter_id=adapter_id)
            (self._root / "ids" / name).unlink()
            sync_folder(self._root / "ids")
            with self._lock:
                self._tables.pointers.pop(adapter_id, None)
                self._tables.damaged_pointers.discard(name)
            self._collect(in_use)

    def _record(self, adapter_id: str, revision: Revision) -> Record:
        with self._lock:
            manifest = self._tables.manifests.get(revision.digest)
        if manifest is None:
            raise DataLossError(
                f"the store's manifest of adapter {adapter_id!r} is damaged: upload it again",
                adapter_id=adapter_id,
                digest=revision.digest,
            )
        return Record(
            id=adapter_id,
            revision=revision.revision,
            created_at=revision.created_at,
            manifest=manifest,
        )

    def _check_condition(self, adapter_id: str, if_digest: str | None) -> None:
        """None: anything goes; "": the id must be new; else it must point to that digest."""
        pointer = self._tables.pointers.get(adapter_id)
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

    def _publish(self, upload: Upload, manifest: Manifest) -> Record:
        """Makes a checked upload visible. Replacing the pointer file is the commit point."""
        with self._writing, disk_full_is_exhaustion():
            with self._lock:
                self._check_condition(upload.id, upload.if_digest)
                old = self._tables.pointers.get(upload.id)
            revision = Revision(revision=1, digest=manifest.digest, created_at=time.time())
            pointer = Pointer(id=upload.id, revisions=(revision,))
            if old is not None:
                # The same content again is the same revision: a client that lost the answer may
                # ask twice.
                same = old.newest.digest == manifest.digest
                pointer = old if same else old.with_revision(manifest.digest, revision.created_at)
            self._blobs.adopt(upload.staging.paths())
            replace_file(
                self._root / "manifests" / manifest_name(manifest.digest), manifest.to_bytes()
            )
            replace_file(self._root / "ids" / file_name(upload.id), pointer.to_bytes())
            with self._lock:
                self._tables.manifests[manifest.digest] = manifest
                self._tables.pointers[upload.id] = pointer
                self._tables.damaged_pointers.discard(file_name(upload.id))
                self._tables.damaged_manifests.discard(manifest_name(manifest.digest))
        return self._record(upload.id, pointer.newest)

    def _forget(self, upload: Upload) -> None:
        with self._writing:
            self._uploads.discard(upload)

    def _collect(self, in_use: Collection[str]) -> tuple[int, int]:
        """Removes manifests and blobs without a pointer; (manifests, blobs).

        A damaged pointer may have pointed to anything, so nothing goes while there is one.
        """
        tables = self._tables
        if tables.damaged_pointers:
            return 0, 0
        with self._lock:
            wanted = {
                revision.digest
                for pointer in tables.pointers.values()
                for revision in pointer.revisions
            } | set(in_use)
            names = {manifest_name(digest) for digest in wanted}
            orphans = {manifest_name(digest) for digest in tables.manifests} - names
            orphans |= tables.damaged_manifests - names
            tables.damaged_manifests &= names
            tables.manifests = {
                digest: found for digest, found in tables.manifests.items() if digest in wanted
            }
        for name in orphans:
            (self._root / "manifests" / name).unlink(missing_ok=True)
        if tables.damaged_manifests:
            return len(orphans), 0
        files = [manifest.files for manifest in tables.manifests.values()]
        files += [upload.files for upload in self._uploads]
        return len(orphans), self._blobs.keep_only({f.sha256 for specs in files for f in specs})
