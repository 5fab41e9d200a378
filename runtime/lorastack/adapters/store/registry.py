"""The adapter store on disk: ids, their revisions, and the files behind them.

`manifest` describes the layout. One process writes a store; others may read it meanwhile. All calls
but look-ups block on the disk, so an event loop runs them in threads; any thread may call anything.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path

from lorastack.adapters.formats.facts import SharedHeads
from lorastack.adapters.store.contents import Contents
from lorastack.adapters.store.manifest import FileSpec, Manifest, Record
from lorastack.adapters.store.opening import Recovery, check_format, lock_store, prepare_store
from lorastack.adapters.store.retention import Pruned, num_revisions, shortened
from lorastack.adapters.store.shared import digests_of, shared_heads
from lorastack.adapters.store.staging import StagingArea
from lorastack.adapters.store.tables import no_adapter
from lorastack.adapters.store.upload import Upload, Uploads, Validate
from lorastack.config import GIB

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
        """Opens or creates the store.

        max_upload: bytes of all files of one adapter. max_staged: bytes of all unfinished uploads;
        a caller gets half of them, or max_upload if that is more.

        read_only: writes nothing and takes no lock, so another process may write; `refresh` takes
        in its changes. Raises FailedPreconditionError if another process writes the store, another
        version wrote it, or it cannot be written.
        """
        self._root = root
        self._read_only = read_only
        self.close = weakref.finalize(self, _close, None if read_only else lock_store(root))
        if read_only:
            check_format(root)
        else:
            prepare_store(root)
        max_upload = min(max_upload, max_staged)
        self._contents = Contents(root, read_only=read_only)
        self._staging = StagingArea(
            root / "staging",
            max_bytes=max_staged,
            max_bytes_per_caller=max(max_staged // 2, max_upload),
        )
        self._uploads = Uploads(
            self._contents, self._staging, max_files=max_files, max_bytes=max_upload
        )
        self.recovery = self._recover()

    # -- look-ups ---------------------------------------------------------------------------------

    def resolve(self, reference: str) -> Record:
        """The newest revision of an id, or the one that `id@sha256:...` names.

        Raises NotFoundError naming it; DataLossError if its pointer or manifest is damaged.
        """
        return self._contents.tables.resolve(reference)

    def revisions(self, adapter_id: str) -> list[Record]:
        """All revisions of an id, newest first; without those whose manifest is damaged.

        Raises NotFoundError, or DataLossError if its pointer is damaged.
        """
        return self._contents.tables.revisions(adapter_id)

    def manifest(self, digest: str) -> Manifest:
        """What is known about a digest. Raises NotFoundError."""
        return self._contents.tables.manifest(digest)

    def shared_heads(self, shared: SharedHeads, base_fingerprint: str) -> Record:
        """The heads that a private part names, of this base model: those with the very weights.

        Raises NotFoundError naming them.
        """
        return shared_heads(self._contents.tables, shared, base_fingerprint)

    def digests_of(self, record: Record) -> set[str]:
        """Of what a request gets by naming this record: itself, and heads that it corrects."""
        return digests_of(self._contents.tables, record)

    def list(self, prefix: str = "") -> list[Record]:
        """The newest revision of every id that starts with the prefix, sorted by id.

        Ids whose newest manifest is damaged are left out: they cannot be served.
        """
        return self._contents.tables.starting_with(prefix)

    def newest(self) -> tuple[Record, ...]:
        """As `list` of all ids; the same object until one of them changes."""
        return self._contents.tables.newest

    def knows(self, digest: str) -> bool:
        """True if a revision of any id has this digest."""
        return digest in self._contents.tables.digests

    def default_medusa(self) -> str:
        """The reference that `set_default_medusa` stored; "" if none."""
        return self._contents.tables.default_medusa

    def stored_bytes(self) -> int:
        """Bytes of all revisions of all ids; files that several share count once."""
        return sum(self._contents.tables.blobs.values())

    def staging_bytes(self) -> int:
        """Bytes of all unfinished uploads."""
        return self._staging.num_bytes

    def hold(self, reference: str) -> Record:
        """As `resolve`; its files stay until `release`, unless another process deletes them."""
        return self._contents.hold(reference)

    def release(self, record: Record) -> None:
        """Ends what `hold` began; files that nothing needs any more go."""
        self._contents.release(record)

    def files(self, digest: str) -> dict[str, Path]:
        """Name of a file that the digest covers -> path of its bytes. Raises NotFoundError."""
        return {spec.name: self.path(spec) for spec in self.manifest(digest).files}

    def path(self, spec: FileSpec) -> Path:
        """Where the bytes of a stored file are."""
        return self._contents.blobs.path(spec.sha256)

    def verify(self, digest: str) -> None:
        """Reads every byte of an adapter. An upload of it replaces what is damaged.

        Raises DataLossError naming what is damaged; NotFoundError if it is deleted meanwhile.
        """
        for spec in self.manifest(digest).files:
            self.verify_file(spec, digest)

    def verify_file(self, spec: FileSpec, digest: str) -> None:
        """As `verify`, for one file of a revision with this digest."""
        self._contents.verify_file(spec, digest)

    def refresh(self) -> bool:
        """Takes in what another process changed; True if anything did. Only if opened read-only.

        Cheap while nothing changes. What cannot be read for the moment stays as it was.
        """
        return self._contents.refresh()

    def check_writable(self) -> None:
        """Raises FailedPreconditionError if the store was opened read-only."""
        self._contents.check_writable()

    # -- uploads ----------------------------------------------------------------------------------

    def plan_upload(
        self, adapter_id: str, files: Sequence[FileSpec]
    ) -> tuple[tuple[FileSpec, int], ...]:
        """The blobs an upload has to bring, each with the number of its bytes that are here.

        Raises InvalidArgumentError or FailedPreconditionError.
        """
        return self._uploads.plan(adapter_id, files)

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
        return self._uploads.begin(adapter_id, files, if_digest, sender)

    def expire_uploads(self) -> int:
        """Removes the unfinished uploads that nobody resumed for a day; their number."""
        return self._staging.expire()

    # -- changes ----------------------------------------------------------------------------------

    def rollback(self, adapter_id: str, digest: str) -> Record:
        """Makes an earlier revision's content the newest one; digest: see `Tables.find`.

        Raises NotFoundError if the id does not have it; InvalidArgumentError; DataLossError;
        FailedPreconditionError.
        """
        with self._contents.changing():
            record = self._contents.tables.find(adapter_id, digest)
            return self._contents.point(adapter_id, record.digest, record.other_files)

    def prune(self, keep: int, adapter_id: str = "", *, in_use: Collection[str] = ()) -> Pruned:
        """Removes old revisions, and what they alone needed; see `shortened`.

        Raises NotFoundError, DataLossError or FailedPreconditionError.
        """
        contents = self._contents
        with contents.changing():
            before = contents.tables
            shorter = shortened(before, keep, adapter_id, in_use)
            contents.shorten(shorter)
            num_bytes = contents.collect(in_use)[2] if shorter or not adapter_id else 0
            return Pruned(
                num_revisions=num_revisions(before) - num_revisions(contents.tables),
                num_bytes=num_bytes,
                digests=before.digests - contents.tables.digests,
            )

    def set_default_medusa(self, reference: str) -> None:
        """Stores the heads of requests that name none; "" for no heads.

        Raises NotFoundError, DataLossError or FailedPreconditionError.
        """
        with self._contents.changing():
            if reference:
                self._contents.tables.resolve(reference)
            self._contents.set_default_medusa(reference)

    def delete(self, adapter_id: str, *, in_use: Collection[str] = ()) -> None:
        """Removes an id with all its revisions, and the bytes that nothing else needs.

        in_use: digests that running rows may load once more; they go at a later call or start.
        Raises NotFoundError or FailedPreconditionError.
        """
        with self._contents.changing():
            if not self._contents.tables.has_pointer(adapter_id):
                raise no_adapter(adapter_id)
            self._contents.remove(adapter_id)
            self._contents.collect(in_use)

    def _recover(self) -> Recovery:
        damaged = self._contents.tables.damaged
        if self._read_only:
            return Recovery(damaged=damaged)
        expired, kept = self._staging.recover()
        manifests, blobs, _ = self._contents.collect(())
        return Recovery(
            expired_uploads=expired,
            kept_uploads=kept,
            removed_manifests=manifests,
            removed_blobs=blobs,
            damaged=damaged,
        )


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
