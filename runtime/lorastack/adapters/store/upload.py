"""One adapter on its way into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

from lorastack.adapters.formats.parse import ParsedAdapter
from lorastack.adapters.store.blobs import BlobStore
from lorastack.adapters.store.manifest import (
    FileSpec,
    Manifest,
    Record,
    adapter_digest,
    in_digest,
    runs,
)
from lorastack.adapters.store.staging import Staging
from lorastack.errors import AbortedError, InvalidArgumentError, Reason

Validate = Callable[[Mapping[str, Path]], ParsedAdapter]


class Upload:
    """Made by `Registry.begin_upload`; ends in `commit`, `suspend` or `abort`.

    Any thread may call anything. An upload that has ended, be it because another one of the same
    files under the same id took over, raises AbortedError when it goes on.
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
        """publish: makes the adapter visible; forget: called when the upload ends."""
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

        Bytes of a blob that is stored by now are dropped: the caller planned before that.
        Raises InvalidArgumentError, ResourceExhaustedError or AbortedError.
        """
        with self._using:
            self._check_open()
            if sha256 not in self._announced:
                raise InvalidArgumentError(f"blob {sha256[:80]!r} was not announced")
            if sha256 in self.needed:
                self.staging.write(sha256, offset, data)

    def commit(self, validate: Validate, *, base_fingerprint: str) -> Record:
        """Checks everything and makes it visible and durable; nothing is stored otherwise.

        validate gets file name -> path and raises if the adapter is not acceptable.
        base_fingerprint: of the base model that `validate` compares with.
        """
        with self._using:
            self._check_open()
            try:
                return self._publish(self, self._checked(validate, base_fingerprint))
            finally:
                self._end(keep=False)

    def suspend(self) -> None:
        """Ends it; what is staged waits for `begin_upload` with the same id and files.

        This and `abort` may be called again, and after `commit`.
        """
        with self._using:
            self._end(keep=True)

    def abort(self) -> None:
        """Ends it and forgets the staged bytes."""
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
