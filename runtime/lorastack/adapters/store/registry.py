"""The adapter store on disk: ids, their revisions, and the files behind them.

`manifest` describes the layout. One process writes a store; others may read it meanwhile. All calls
but look-ups block on the disk, so an event loop runs them in threads; any thread may call anything.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from lorastack.adapters.store.blobs import BlobStore
from lorastack.adapters.store.durable import disk_full_is_exhaustion, replace_file, sync_folder
from lorastack.adapters.store.ids import check_id, file_name
from lorastack.adapters.store.manifest import (
    FileSpec,
    Manifest,
    Pointer,
    Record,
    check_files,
    in_digest,
)
from lorastack.adapters.store.opening import (
    Recovery,
    TableFiles,
    check_format,
    lock_store,
    prepare_store,
    write_default,
)
from lorastack.adapters.store.retention import Pruned, num_revisions, shortened
from lorastack.adapters.store.staging import StagingArea, staging_key
from lorastack.adapters.store.tables import manifest_name
from lorastack.adapters.store.upload import Upload, Validate
from lorastack.config import GIB
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
)

__all__ = ["Pruned", "Record", "Recovery", "Registry", "Upload", "Validate"]


class Registry:
    """Adapter ids, their immutable digests, and the bytes behind them."""

    def __init__(
        self,
        root: Path,
        *,
        max_upload: int = 4 * GIB,
        max_files: int = 64,
        max_staged: int = 8 * GIB,
        read_only: bool = False,
    ) -> None:
        """Opens or creates the store. max_upload: bytes of all files of one adapter; max_staged:
        of all unfinished uploads, of which a caller has half, or as much as one adapter may need.

        read_only: writes nothing and takes no lock, so another process may write; `refresh` takes
        in its changes. Raises FailedPreconditionError if another process writes the store, another
        version wrote it, or it cannot be written.
        """
        self._root = root
        self._max_upload = min(max_upload, max_staged)
        self._max_files = max_files
        self._read_only = read_only
        self._blobs = BlobStore(root / "blobs" / "sha256")
        # Mutators hold _writing for their disk work, and then replace _tables, which are never
        # changed in place: looking an id up waits for nobody.
        self._writing = Lock()
        self._uploads: dict[str, Upload] = {}  # by staging key
        self._staging = StagingArea(
            root / "staging",
            max_bytes=max_staged,
            max_bytes_per_caller=max(max_staged // 2, self._max_upload),
        )
        self.close = weakref.finalize(self, _close, None if read_only else lock_store(root))
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

    def default_medusa(self) -> str:
        """The reference that `set_default_medusa` stored; "" if none."""
        return self._tables.default_medusa

    def stored_bytes(self) -> int:
        """On the disk, of all revisions of all ids; what several share counts once."""
        return sum(self._tables.blobs.values())

    def staging_bytes(self) -> int:
        """On the disk, of all unfinished uploads."""
        return self._staging.num_bytes

    def hold(self, reference: str) -> Record:
        """As `resolve`; its files stay until `release`, unless another process deletes them."""
        with self._writing:
            record = self._tables.resolve(reference)
            self._blobs.hold(spec.sha256 for spec in record.files)
            return record

    def release(self, record: Record) -> None:
        """Ends what `hold` began; files that nothing needs any more go."""
        held = [spec.sha256 for spec in record.files]
        with self._writing:
            self._blobs.release(held)
            if not self._read_only and not self._tables.blobs.keys() >= {*held}:
                self._drop_blobs()

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
        self._check(adapter_id, files)
        needed = self._missing(files)
        sizes = self._staging.sizes(staging_key(adapter_id, files), needed)
        return tuple((spec, sizes[spec.sha256]) for spec in needed)

    def begin_upload(
        self,
        adapter_id: str,
        files: Sequence[FileSpec],
        if_digest: str | None = None,
        *,
        sender: str = "",
    ) -> Upload:
        """Starts an upload, or goes on with a suspended one; the caller ends it.

        if_digest: see `Tables.check_condition`; sender: whose share of the room for unfinished
        uploads it takes. An upload of the same files under the same id that has not ended is
        suspended. Raises InvalidArgumentError, AlreadyExistsError, AbortedError or
        FailedPreconditionError.
        """
        self._check(adapter_id, files)
        key = staging_key(adapter_id, files)
        while True:
            with self._changing():
                self._tables.check_condition(adapter_id, if_digest)
                older = self._uploads.get(key)
                if older is None:
                    upload = Upload(
                        adapter_id=adapter_id,
                        files=tuple(files),
                        if_digest=if_digest,
                        staging=self._staging.open(key, self._missing(files), sender),
                        blobs=self._blobs,
                        publish=self._publish,
                        forget=self._forget,
                    )
                    self._uploads[key] = upload
                    return upload
            older.suspend()  # outside, as it may have to wait for its commit

    def expire_uploads(self) -> int:
        """Removes those that nobody went on with for a day; their number."""
        return self._staging.expire()

    def _check(self, adapter_id: str, files: Sequence[FileSpec]) -> None:
        check_id(adapter_id)
        check_files(files, max_files=self._max_files, max_bytes=self._max_upload)

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

    def _publish(self, upload: Upload, manifest: Manifest) -> Record:
        """Makes a checked upload visible. Replacing the pointer file is the commit point."""
        with self._changing():
            self._tables.check_condition(upload.id, upload.if_digest)
            self._blobs.adopt(upload.staging.paths())
            path = self._root / "manifests" / manifest_name(manifest.digest)
            replace_file(path, manifest.to_bytes())
            self._tables = self._tables.with_manifest(manifest)
            others = tuple(spec for spec in upload.files if not in_digest(spec.name))
            return self._point(upload.id, manifest.digest, others)

    def _forget(self, upload: Upload) -> None:
        with self._writing:
            del self._uploads[staging_key(upload.id, upload.files)]

    # -- changes ----------------------------------------------------------------------------------

    def rollback(self, adapter_id: str, digest: str) -> Record:
        """Makes an earlier revision's content the newest one; digest: see `Tables.find`.

        Raises NotFoundError if the id does not have it; InvalidArgumentError; DataLossError;
        FailedPreconditionError.
        """
        with self._changing():
            record = self._tables.find(adapter_id, digest)
            return self._point(adapter_id, record.digest, record.other_files)

    def prune(self, keep: int, adapter_id: str = "", *, in_use: Collection[str] = ()) -> Pruned:
        """Removes old revisions, and what they alone needed; see `shortened`.

        Raises NotFoundError, DataLossError or FailedPreconditionError.
        """
        with self._changing():
            before = self._tables
            shorter = shortened(before, keep, adapter_id, in_use)
            for name, pointer in shorter.items():
                replace_file(self._root / "ids" / file_name(name), pointer.to_bytes())
            self._tables = before.with_fewer_revisions(shorter)
            num_bytes = self._collect(in_use)[2] if shorter or not adapter_id else 0
            return Pruned(
                num_revisions=num_revisions(before) - num_revisions(self._tables),
                num_bytes=num_bytes,
                digests=before.digests - self._tables.digests,
            )

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
            if not self._tables.has_pointer(adapter_id):
                raise NotFoundError(f"no adapter {adapter_id[:300]!r}", adapter_id=adapter_id)
            (self._root / "ids" / file_name(adapter_id)).unlink()
            sync_folder(self._root / "ids")
            self._tables = self._tables.without_pointer(adapter_id)
            self._collect(in_use)

    def _point(self, adapter_id: str, digest: str, other_files: tuple[FileSpec, ...]) -> Record:
        """Makes a stored digest the newest revision of an id."""
        old = self._tables.pointers.get(adapter_id)
        pointer = Pointer.after(old, adapter_id, digest, other_files)
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
        damaged = self._tables.damaged
        if self._read_only:
            return Recovery(damaged=damaged)
        expired, kept = self._staging.recover()
        manifests, blobs, _ = self._collect(())
        return Recovery(
            expired_uploads=expired,
            kept_uploads=kept,
            removed_manifests=manifests,
            removed_blobs=blobs,
            damaged=damaged,
        )

    def _collect(self, in_use: Collection[str]) -> tuple[int, int, int]:
        """Removes manifests and blobs without a pointer; (manifests, blobs, bytes of blobs)."""
        before = self._tables
        if before.damaged_pointers:  # they may have pointed to anything
            return 0, 0, 0
        self._tables = before.with_manifests_of(before.digests.union(in_use))
        orphans = before.manifest_names() - self._tables.manifest_names()
        for name in orphans:
            (self._root / "manifests" / name).unlink(missing_ok=True)
        return len(orphans), *self._drop_blobs()

    def _drop_blobs(self) -> tuple[int, int]:
        """Removes blobs that nothing names, running uploads neither; (their number, bytes)."""
        if self._tables.damaged:
            return 0, 0
        arriving = {spec.sha256 for upload in self._uploads.values() for spec in upload.files}
        return self._blobs.keep_only(self._tables.stored_blobs() | arriving)


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
