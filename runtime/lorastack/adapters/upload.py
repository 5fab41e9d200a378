"""One adapter on its way into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lorastack.adapters.blobs import BlobStore, Staging
from lorastack.adapters.formats import ParsedAdapter
from lorastack.adapters.manifest import FileSpec, Manifest, Record, adapter_digest

Validate = Callable[[Mapping[str, Path]], ParsedAdapter]


class Upload:
    """Made by `Registry.begin_upload`. Used by one thread at a time; ends in commit or abort."""

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
        self._blobs = blobs
        self._publish = publish
        self._forget = forget

    @property
    def needed(self) -> frozenset[str]:
        """sha256 of the blobs that must be written; the others are stored already."""
        return self.staging.needed

    def write(self, sha256: str, offset: int, data: bytes) -> None:
        """Appends to a blob. Raises InvalidArgumentError or ResourceExhaustedError.

        A blob of this adapter that another upload has stored since the caller asked is not needed
        any more: its bytes are dropped.
        """
        if sha256 not in {spec.sha256 for spec in self.files} - self.needed:
            self.staging.write(sha256, offset, data)

    def commit(self, validate: Validate, *, base_fingerprint: str) -> Record:
        """Checks everything and makes it visible and durable; nothing is stored otherwise.

        validate gets file name -> path and raises if the adapter is not acceptable.
        base_fingerprint: of the base model that `validate` compares with.
        """
        digest = adapter_digest(self.files)
        try:
            self.staging.finish()
            for spec in self.files:
                if spec.sha256 not in self.needed:
                    self._blobs.check(spec, digest)
            parsed = validate({spec.name: self._path(spec) for spec in self.files})
            manifest = Manifest(
                digest=digest,
                files=self.files,
                kind=parsed.kind,
                base_model=parsed.base_model,
                base_fingerprint=base_fingerprint,
                rank=parsed.rank,
                alpha=parsed.alpha,
                target_modules=parsed.target_modules,
                num_heads=parsed.num_heads,
                num_layers=parsed.num_layers,
                medusa_version=parsed.medusa_version,
            )
            return self._publish(self, manifest)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forgets the staged bytes. May be called again, and after `commit`."""
        self._forget(self)
        self.staging.remove()

    def _path(self, spec: FileSpec) -> Path:
        folder = self.staging if spec.sha256 in self.needed else self._blobs
        return folder.path(spec.sha256)
