"""What a store holds, in memory and on the disk, and each single change of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from lorastack.adapters.store.blobs import BlobStore
from lorastack.adapters.store.durable import disk_full_is_exhaustion, replace_file, sync_folder
from lorastack.adapters.store.ids import file_name
from lorastack.adapters.store.manifest import FileSpec, Manifest, Pointer, Record
from lorastack.adapters.store.opening import TableFiles, write_default
from lorastack.adapters.store.tables import manifest_name
from lorastack.errors import DataLossError, FailedPreconditionError, NotFoundError, Reason


class Contents:
    """A store's tables and blobs. tables: replaced, not changed in place: look-ups never wait.

    Changes are made within `changing`: first on the disk, durably, then in the tables.
    lock: held during each of them.
    """

    def __init__(self, root: Path, *, read_only: bool) -> None:
        """The store must be locked, unless it is only read, and prepared. Raises OSError."""
        self.blobs = BlobStore(root / "blobs" / "sha256")
        self._root = root
        self._read_only = read_only
        self.lock = Lock()
        self._table_files = TableFiles(root)
        self.tables = self._table_files.read()

    # -- one change at a time ---------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One thread at a time; after a failure the tables say what the disk says.

        Raises FailedPreconditionError if the store was opened read-only.
        """
        self.check_writable()
        with self.lock, disk_full_is_exhaustion():
            try:
                yield
            except OSError:
                with suppress(OSError):
                    self.tables = self._table_files.read()
                    self.drop_blobs()
                raise

    def check_writable(self) -> None:
        """Raises FailedPreconditionError if the store was opened read-only."""
        if self._read_only:
            raise FailedPreconditionError(
                "this server only reads its store: ask the one that writes it",
                reason=Reason.STORE_READ_ONLY,
            )

    def put_manifest(self, manifest: Manifest) -> None:
        """Stores what is known about a digest whose blobs are here."""
        replace_file(self._root / "manifests" / manifest_name(manifest.digest), manifest.to_bytes())
        self.tables = self.tables.with_manifest(manifest)

    def point(self, adapter_id: str, digest: str, other_files: tuple[FileSpec, ...]) -> Record:
        """Makes a stored digest the newest revision of an id: the commit point of every upload."""
        old = self.tables.pointers.get(adapter_id)
        pointer = Pointer.after(old, adapter_id, digest, other_files)
        self._write_pointer(pointer)
        self.tables = self.tables.with_pointer(pointer)
        return self.tables.record(adapter_id, pointer.newest)

    def shorten(self, pointers: Mapping[str, Pointer]) -> None:
        """Stores pointers, by id, that lost some of their older revisions."""
        for pointer in pointers.values():
            self._write_pointer(pointer)
        self.tables = self.tables.with_fewer_revisions(pointers)

    def remove(self, adapter_id: str) -> None:
        """Removes an id's pointer, which may be damaged."""
        (self._root / "ids" / file_name(adapter_id)).unlink()
        sync_folder(self._root / "ids")
        self.tables = self.tables.without_pointer(adapter_id)

    def set_default_medusa(self, reference: str) -> None:
        """Stores the reference of the default heads; "" for none."""
        write_default(self._root, reference)
        self.tables = self.tables.with_default_medusa(reference)

    def collect(self, in_use: Collection[str]) -> tuple[int, int, int]:
        """Removes manifests and blobs that no pointer needs; (manifests, blobs, bytes of blobs).

        in_use: digests that stay all the same. Nothing goes while a pointer is damaged, as it may
        have pointed to anything.
        """
        before = self.tables
        if before.damaged_pointers:
            return 0, 0, 0
        self.tables = before.with_manifests_of(before.digests.union(in_use))
        orphans = before.manifest_names() - self.tables.manifest_names()
        for name in orphans:
            (self._root / "manifests" / name).unlink(missing_ok=True)
        return len(orphans), *self.drop_blobs()

    def drop_blobs(self) -> tuple[int, int]:
        """Removes blobs that nothing names and nobody holds; (their number, their bytes)."""
        if self.tables.damaged:
            return 0, 0
        return self.blobs.keep_only(self.tables.stored_blobs())

    def _write_pointer(self, pointer: Pointer) -> None:
        replace_file(self._root / "ids" / file_name(pointer.id), pointer.to_bytes())

    # -- while others change it -------------------------------------------------------------------

    def refresh(self) -> bool:
        """Takes in what another process changed; True if anything did. Only if opened read-only.

        Cheap while nothing changes. What cannot be read for the moment stays as it was.
        """
        if not self._read_only:
            return False
        with self.lock, suppress(OSError):
            before, self.tables = self.tables, self._table_files.read()
            return self.tables is not before
        return False

    def hold(self, reference: str) -> Record:
        """Resolves a reference; files stay until `release`, unless another process deletes them.

        Raises NotFoundError or DataLossError.
        """
        with self.lock:
            record = self.tables.resolve(reference)
            self.blobs.hold(spec.sha256 for spec in record.files)
            return record

    def release(self, record: Record) -> None:
        """Ends what `hold` began; files that nothing needs any more go."""
        held = {spec.sha256 for spec in record.files}
        with self.lock:
            self.blobs.release(spec.sha256 for spec in record.files)
            if not self._read_only and not self.tables.blobs.keys() >= held:
                self.drop_blobs()

    def verify_file(self, spec: FileSpec, digest: str) -> None:
        """Reads every byte of a file of an adapter. An upload of it replaces what is damaged.

        Raises DataLossError naming what is damaged; NotFoundError if it is deleted meanwhile.
        """
        try:
            self.blobs.check(spec, digest)
        except DataLossError:
            self.refresh()
            with self.lock:  # no deletion or upload runs: now it is damage, or it is gone
                self.tables.manifest(digest)
                if spec.sha256 not in self.tables.stored_blobs():
                    raise NotFoundError(
                        f"{spec.name} of {digest} was replaced", digest=digest
                    ) from None
                self.blobs.check(spec, digest, mark=not self._read_only)
