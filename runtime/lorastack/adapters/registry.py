"""The adapter store on disk: ids, their revisions, and the files behind them.

`manifest` describes the layout. One process writes a store; others may read it meanwhile. All calls
but look-ups block on the disk, so an event loop runs them in threads; any thread may call anything.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from lorastack.adapters.blobs import BlobStore
from lorastack.adapters.durable import disk_full_is_exhaustion, replace_file, sync_folder
from lorastack.adapters.ids import check_id, file_name, is_digest
from lorastack.adapters.manifest import (
    FileSpec,
    Manifest,
    Pointer,
    Record,
    Revision,
    check_files,
    in_digest,
)
from lorastack.adapters.opening import (
    Recovery,
    TableFiles,
    check_format,
    lock_store,
    prepare_store,
    write_default,
)
from lorastack.adapters.staging import (
    Staging,
    expire_staging,
    staged_sizes,
    staging_bytes,
    staging_key,
)
from lorastack.adapters.tables import manifest_name
from lorastack.adapters.upload import Upload, Validate
from lorastack.config import GIB
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)

__all__ = ["Record", "Recovery", "Registry", "Upload", "Validate"]


class Registry:
    """Adapter ids, their immutable digests, and the bytes behind them."""

    def __init__(
        self,
        root: Path,
        *,
        max_upload: int = 4 * GIB,
        max_files: int = 64,
        read_only: bool = False,
    ) -> None:
        """Opens or creates the store. max_upload: bytes of all files of one adapter.

        read_only: writes nothing and takes no lock, so another process may write; `refresh` takes
        in its changes. Raises FailedPreconditionError if another process writes the store, another
        version wrote it, or it cannot be written.
        """
        self._root = root
        self._max_upload = max_upload
        self._max_files = max_files
        self._read_only = read_only
        self._blobs = BlobStore(root / "blobs" / "sha256")
        # Mutators hold _writing for their disk work, and then replace _tables, which are never
        # changed in place: looking an id up waits for nobody.
        self._writing = Lock()
        self._uploads: dict[str, Upload] = {}  # by staging key
        locks = () if read_only else (lock_store(root),)
        self.close = weakref.finalize(self, _close_all, locks)
        if read_only:
            check_format(root)
        else:
            prepare_store(root)
        self._table_files = TableFiles(root)
        self._tables = self._table_files.read()
        self.recovery = self._recover()

    # -- look-ups ---------------------------------------------------------------------------------

    def resolve(self, reference: str) -> Record:
        """The newest revision of an id, or the one that `id@sha256:...` names.

        Raises NotFoundError naming it; DataLossError if its pointer or manifest is damaged.
        """
        return self._tables.resolve(reference)

    def revisions(self, adapter_id: str) -> list[Record]:
        """All revisions of an id, newest first; without those whose manifest is damaged.

        Raises NotFoundError, or DataLossError if its pointer is damaged.
        """
        return self._tables.revisions(adapter_id)

    def manifest(self, digest: str) -> Manifest:
        """What is known about a digest. Raises NotFoundError."""
        return self._tables.manifest(digest)

    def list(self, prefix: str = "") -> list[Record]:
        """The newest revision of every id that starts with the prefix, sorted by id.

        Ids whose newest manifest is damaged are left out: they cannot be served.
        """
        return self._tables.starting_with(prefix)

    def knows(self, digest: str) -> bool:
        """Whether a revision of any id has this digest."""
        return digest in self._tables.digests

    def staging_bytes(self) -> int:
        """Bytes of unfinished uploads."""
        return staging_bytes(self._root / "staging")

    def default_medusa(self) -> str:
        """The reference that `set_default_medusa` stored; "" if none."""
        return self._tables.default_medusa

    def files(self, digest: str) -> dict[str, Path]:
        """Name of a file that the digest covers -> path of its bytes. Raises NotFoundError."""
        return {spec.name: self.path(spec) for spec in self.manifest(digest).files}

    def path(self, spec: FileSpec) -> Path:
        """Where the bytes of a stored file are."""
        return self._blobs.path(spec.sha256)

    def verify(self, digest: str) -> None:
        """Reads every byte of an adapter. An upload of it replaces what is damaged.

        Raises DataLossError naming what is damaged; NotFoundError if it is deleted meanwhile.
        """
        for spec in self.manifest(digest).files:
            self.verify_file(spec, digest)

    def verify_file(self, spec: FileSpec, digest: str) -> None:
        """As `verify`, for one file of a revision with this digest."""
        try:
            self._blobs.check(spec, digest)
        except DataLossError:
            self.refresh()
            with self._writing:  # no deletion or upload runs: now it is damage, or it is gone
                self.manifest(digest)
                if spec.sha256 not in self._tables.stored_blobs():
                    raise NotFoundError(
                        f"{spec.name} of {digest} was replaced", digest=digest
                    ) from None
                self._blobs.check(spec, digest, mark=not self._read_only)

    def refresh(self) -> bool:
        """Takes in what another process changed; whether anything did. Only if opened read-only.

        Cheap while nothing changes. What cannot be read for the moment stays as it was.
        """
        if not self._read_only:
            return False
        with self._writing, suppress(OSError):
            before, self._tables = self._tables, self._table_files.read()
            return self._tables is not before
        return False

    # -- uploads ----------------------------------------------------------------------------------

    def plan_upload(
        self, adapter_id: str, files: Sequence[FileSpec]
    ) -> tuple[tuple[FileSpec, int], ...]:
        """The blobs an upload has to bring, each with the number of its bytes that are here.

        Raises InvalidArgumentError or FailedPreconditionError.
        """
        self._check_writable()
        check_id(adapter_id)
        check_files(files, max_files=self._max_files, max_bytes=self._max_upload)
        needed = self._missing(files)
        sizes = staged_sizes(self._staging_folder(staging_key(adapter_id, files)), needed)
        return tuple((spec, sizes[spec.sha256]) for spec in needed)

    def begin_upload(
        self, adapter_id: str, files: Sequence[FileSpec], if_digest: str | None = None
    ) -> Upload:
        """Starts an upload, or goes on with a suspended one; the caller ends it.

        if_digest: see `Tables.check_condition`. An upload of the same files under the same id that
        has not ended is suspended. Raises InvalidArgumentError, AlreadyExistsError, AbortedError
        or FailedPreconditionError.
        """
        check_id(adapter_id)
        check_files(files, max_files=self._max_files, max_bytes=self._max_upload)
        if if_digest and not is_digest(if_digest):
            raise InvalidArgumentError(
                f"if_digest {if_digest[:80]!r} is not sha256:<64 hex digits>"
            )
        key = staging_key(adapter_id, files)
        while True:
            with self._changing():
                self._tables.check_condition(adapter_id, if_digest)
                older = self._uploads.get(key)
                if older is None:
                    expire_staging(self._root / "staging", self._uploads.keys() | {key})
                    upload = Upload(
                        adapter_id=adapter_id,
                        files=tuple(files),
                        if_digest=if_digest,
                        staging=Staging(self._staging_folder(key), self._missing(files)),
                        blobs=self._blobs,
                        publish=self._publish,
                        forget=self._forget,
                    )
                    self._uploads[key] = upload
                    return upload
            older.suspend()  # outside, as it may have to wait for its commit

    def _missing(self, files: Sequence[FileSpec]) -> tuple[FileSpec, ...]:
        """Those of the files whose bytes must travel.

        Bytes count as present only if an id has them in one of its revisions, not because a file
        happens to lie there.
        """
        listed = self._tables.blobs
        unique = {spec.sha256: spec for spec in files}
        return tuple(
            spec
            for spec in unique.values()
            if listed.get(spec.sha256) != spec.size or not self._blobs.has(spec)
        )

    def _staging_folder(self, key: str) -> Path:
        return self._root / "staging" / key

    def _publish(self, upload: Upload, manifest: Manifest) -> Record:
        """Makes a checked upload visible. Replacing the pointer file is the commit point."""
        with self._changing():
            self._tables.check_condition(upload.id, upload.if_digest)
            self._blobs.adopt(upload.staging.paths())
            replace_file(
                self._root / "manifests" / manifest_name(manifest.digest), manifest.to_bytes()
            )
            self._tables = self._tables.with_manifest(manifest)
            others = tuple(spec for spec in upload.files if not in_digest(spec.name))
            return self._point(upload.id, manifest.digest, others)

    def _forget(self, upload: Upload) -> None:
        with self._writing:
            del self._uploads[staging_key(upload.id, upload.files)]

    # -- changes ----------------------------------------------------------------------------------

    def rollback(self, adapter_id: str, digest: str) -> Record:
        """Makes an earlier revision's content the newest one.

        Raises NotFoundError if the id never had it; DataLossError; FailedPreconditionError.
        """
        with self._changing():
            record = self._tables.resolve(f"{adapter_id}@{digest}")
            return self._point(adapter_id, digest, record.other_files)

    def set_default_medusa(self, reference: str) -> None:
        """Stores which heads requests get that name none; "": no heads.

        Raises NotFoundError, DataLossError or FailedPreconditionError.
        """
        with self._changing():
            if reference:
                self._tables.resolve(reference)
            write_default(self._root, reference)
            self._tables = self._tables.with_default_medusa(reference)

    def delete(self, adapter_id: str, *, in_use: Collection[str] = ()) -> None:
        """Removes an id with all its revisions, and the bytes that nothing else needs.

        in_use: digests that running rows may load once more; they go at a later call or start.
        Raises NotFoundError or FailedPreconditionError.
        """
        with self._changing():
            name = file_name(adapter_id)
            known = adapter_id in self._tables.pointers
            if not known and name not in self._tables.damaged_pointers:
                raise NotFoundError(f"no adapter {adapter_id[:300]!r}", adapter_id=adapter_id)
            (self._root / "ids" / name).unlink()
            sync_folder(self._root / "ids")
            self._tables = self._tables.without_pointer(adapter_id)
            self._collect(in_use)

    def _point(self, adapter_id: str, digest: str, other_files: tuple[FileSpec, ...]) -> Record:
        """Makes a stored digest the newest revision of an id."""
        old = self._tables.pointers.get(adapter_id)
        revision = Revision(
            revision=1, digest=digest, created_at=time.time(), other_files=other_files
        )
        if old is None:
            pointer = Pointer(id=adapter_id, revisions=(revision,))
        else:
            pointer = old.with_revision(revision)
        replace_file(self._root / "ids" / file_name(adapter_id), pointer.to_bytes())
        self._tables = self._tables.with_pointer(pointer)
        return self._tables.record(adapter_id, pointer.newest)

    def _check_writable(self) -> None:
        if self._read_only:
            raise FailedPreconditionError(
                "this server only reads its store: ask the one that writes it",
                reason=Reason.STORE_READ_ONLY,
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One mutator at a time; after a failure the tables say what the disk says.

        Raises FailedPreconditionError if the store was opened read-only.
        """
        self._check_writable()
        with self._writing, disk_full_is_exhaustion():
            try:
                yield
            except OSError:
                with suppress(OSError):
                    self._tables = self._table_files.read()
                    self._drop_blobs()
                raise

    def _recover(self) -> Recovery:
        tables = self._tables
        damaged = tuple(sorted(tables.damaged_pointers | tables.damaged_manifests))
        if self._read_only:
            return Recovery(damaged=damaged)
        expired, kept = expire_staging(self._root / "staging", ())
        manifests, blobs = self._collect(())
        return Recovery(
            expired_uploads=expired,
            kept_uploads=kept,
            removed_manifests=manifests,
            removed_blobs=blobs,
            damaged=damaged,
        )

    def _collect(self, in_use: Collection[str]) -> tuple[int, int]:
        """Removes manifests and blobs without a pointer; (manifests, blobs)."""
        before = self._tables
        if before.damaged_pointers:  # they may have pointed to anything
            return 0, 0
        self._tables = before.with_manifests_of(before.digests.union(in_use))
        orphans = before.manifest_names() - self._tables.manifest_names()
        for name in orphans:
            (self._root / "manifests" / name).unlink(missing_ok=True)
        return len(orphans), self._drop_blobs()

    def _drop_blobs(self) -> int:
        """Removes blobs that neither a manifest nor a running upload names; their number."""
        if self._tables.damaged_pointers or self._tables.damaged_manifests:
            return 0
        arriving = {spec.sha256 for upload in self._uploads.values() for spec in upload.files}
        return self._blobs.keep_only(self._tables.stored_blobs() | arriving)


def _close_all(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)
