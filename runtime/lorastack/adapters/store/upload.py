"""Adapters on their way into the store: one upload, and all that have not ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock

from lorastack.adapters.formats.parse import ParsedAdapter
from lorastack.adapters.store.blobs import BlobStore
from lorastack.adapters.store.contents import Contents
from lorastack.adapters.store.ids import check_id
from lorastack.adapters.store.manifest import (
    FileSpec,
    Manifest,
    Record,
    adapter_digest,
    check_files,
    in_digest,
    runs,
)
from lorastack.adapters.store.shared import check_shared_heads
from lorastack.adapters.store.staging import Staging, StagingArea, staging_key
from lorastack.errors import AbortedError, InvalidArgumentError, Reason

Validate = Callable[[Mapping[str, Path]], ParsedAdapter]


class Upload:
    """Made by `Uploads.begin`; ends in `commit`, `suspend` or `abort`.

    Any thread may call anything. An upload that has ended raises AbortedError when it goes on;
    another one of the same files under the same id ends it, too.
    """

    def __init__(
        self,
        *,
        adapter_id: str,
        files: tuple[FileSpec, ...],
        if_digest: str | None,
        staging: Staging,
        blobs: BlobStore,
        publish: Callable[[Upload, Manifest], Record],
        forget: Callable[[Upload], None],
    ) -> None:
        """publish: makes the checked adapter visible; forget: called when the upload ends."""
        self.id = adapter_id
        self.files = files
        self.if_digest = if_digest
        self.staging = staging
        self._announced = frozenset(spec.sha256 for spec in files)
        self._blobs = blobs
        self._publish = publish
        self._forget = forget
        self._using = Lock()
        self._ended = False

    @property
    def needed(self) -> frozenset[str]:
        """sha256 of the blobs that must be written; the others are stored already."""
        return self.staging.needed

    @property
    def staged(self) -> Mapping[str, int]:
        """sha256 of a needed blob -> how many of its bytes are here."""
        return self.staging.sizes

    @property
    def num_missing(self) -> int:
        """Bytes still to come."""
        return self.staging.num_missing

    def write(self, sha256: str, offset: int, data: bytes) -> None:
        """Appends to a blob. The first chunk may start before the end of what is staged.

        Bytes of a blob that needs none are dropped: it was stored after the caller planned.
        Raises InvalidArgumentError, ResourceExhaustedError or AbortedError.
        """
        with self._using:
            self._check_open()
            if sha256 not in self._announced:
                raise InvalidArgumentError(f"blob {sha256[:80]!r} was not announced")
            if sha256 in self.needed:
                self.staging.write(sha256, offset, data)

    def commit(self, validate: Validate, *, base_fingerprint: str) -> Record:
        """Checks all files and makes the adapter visible and durable, or else stores nothing.

        validate: gets file name -> path; what it raises is raised here. base_fingerprint: the base
        model's, for which it validates. Also raises InvalidArgumentError, AlreadyExistsError,
        AbortedError, DataLossError, ResourceExhaustedError, and FailedPreconditionError for a
        private part of heads that are not stored.
        """
        with self._using:
            self._check_open()
            try:
                return self._publish(self, self._checked(validate, base_fingerprint))
            finally:
                self._end(keep=False)

    def suspend(self) -> None:
        """Ends the upload; the staged bytes wait for the next one of the same id and files.

        This and `abort` may be called again, and after `commit`.
        """
        with self._using:
            self._end(keep=True)

    def abort(self) -> None:
        """Ends the upload and drops the staged bytes."""
        with self._using:
            self._end(keep=False)

    def _checked(self, validate: Validate, base_fingerprint: str) -> Manifest:
        digest = adapter_digest(self.files)
        self.staging.finish()
        for spec in self.files:
            if spec.sha256 not in self.needed:
                self._blobs.check(spec, digest, mark=True)
        parsed = validate({spec.name: self._path(spec) for spec in self.files})
        return Manifest(
            digest=digest,
            files=tuple(spec for spec in self.files if in_digest(spec.name)),
            facts=parsed.facts,
            base_fingerprint=base_fingerprint,
            scales=runs(parsed.scales.values()),
        )

    def _check_open(self) -> None:
        if self._ended:
            raise AbortedError(
                f"this upload of {self.id!r} has ended: another one of the same files took over",
                reason=Reason.UPLOAD_TAKEN_OVER,
                adapter_id=self.id,
            )

    def _end(self, *, keep: bool) -> None:
        if self._ended:
            return
        self._ended = True
        self.staging.close(keep=keep)
        self._forget(self)

    def _path(self, spec: FileSpec) -> Path:
        folder = self.staging if spec.sha256 in self.needed else self._blobs
        return folder.path(spec.sha256)


class Uploads:
    """All uploads of a store that have not ended. Any thread may call anything."""

    def __init__(
        self, contents: Contents, staging: StagingArea, *, max_files: int, max_bytes: int
    ) -> None:
        """max_files, max_bytes: of one adapter."""
        self.running: dict[str, Upload] = {}  # by staging key
        self._contents = contents
        self._staging = staging
        self._max_files = max_files
        self._max_bytes = max_bytes

    def plan(self, adapter_id: str, files: Sequence[FileSpec]) -> tuple[tuple[FileSpec, int], ...]:
        """See `Registry.plan_upload`."""
        self._contents.check_writable()
        self._check(adapter_id, files)
        needed = self._missing(files)
        sizes = self._staging.sizes(staging_key(adapter_id, files), needed)
        return tuple((spec, sizes[spec.sha256]) for spec in needed)

    def begin(
        self, adapter_id: str, files: Sequence[FileSpec], if_digest: str | None, sender: str
    ) -> Upload:
        """See `Registry.begin_upload`."""
        self._check(adapter_id, files)
        key = staging_key(adapter_id, files)
        while True:
            with self._contents.changing():
                self._contents.tables.check_condition(adapter_id, if_digest)
                older = self.running.get(key)
                if older is None:
                    upload = Upload(
                        adapter_id=adapter_id,
                        files=tuple(files),
                        if_digest=if_digest,
                        staging=self._staging.open(key, self._missing(files), sender),
                        blobs=self._contents.blobs,
                        publish=self._publish,
                        forget=self._forget,
                    )
                    # What is stored already must still be there when it is committed.
                    self._contents.blobs.hold(spec.sha256 for spec in files)
                    self.running[key] = upload
                    return upload
            older.suspend()  # outside, as it may have to wait for its commit

    def _check(self, adapter_id: str, files: Sequence[FileSpec]) -> None:
        check_id(adapter_id)
        check_files(files, max_files=self._max_files, max_bytes=self._max_bytes)

    def _missing(self, files: Sequence[FileSpec]) -> tuple[FileSpec, ...]:
        """The files whose bytes must travel, equal ones once.

        Bytes count as present only if an id has them in one of its revisions, not because a file
        happens to lie there.
        """
        listed = self._contents.tables.blobs
        unique = {spec.sha256: spec for spec in files}
        return tuple(
            spec
            for spec in unique.values()
            if listed.get(spec.sha256) != spec.size or not self._contents.blobs.has(spec)
        )

    def _publish(self, upload: Upload, manifest: Manifest) -> Record:
        """Makes a checked upload visible, while what it needs of the store is there."""
        with self._contents.changing():
            self._contents.tables.check_condition(upload.id, upload.if_digest)
            check_shared_heads(self._contents.tables, manifest)
            self._contents.blobs.adopt(upload.staging.paths())
            self._contents.put_manifest(manifest)
            others = tuple(spec for spec in upload.files if not in_digest(spec.name))
            return self._contents.point(upload.id, manifest.digest, others)

    def _forget(self, upload: Upload) -> None:
        with self._contents.lock:
            self._contents.blobs.release(spec.sha256 for spec in upload.files)
            del self.running[staging_key(upload.id, upload.files)]
