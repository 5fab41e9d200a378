"""Finished file bytes by sha256."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lorastack.adapters.durable import hash_file, sync_folder
from lorastack.adapters.manifest import FileSpec
from lorastack.errors import DataLossError


class BlobStore:
    """Immutable blobs in one flat folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def has(self, spec: FileSpec) -> bool:
        """Whether a file of that name and size is there; its bytes are not looked at."""
        try:
            return self.path(spec.sha256).stat().st_size == spec.size
        except FileNotFoundError:
            return False

    def adopt(self, paths: Iterable[Path]) -> None:
        """Moves checked, synced files in, named by their sha256; durable when it returns."""
        for path in paths:
            path.replace(self.path(path.name))
        sync_folder(self._folder)

    def check(self, spec: FileSpec, digest: str) -> None:
        """Raises DataLossError naming the blob if its bytes are gone or not what they were."""
        try:
            intact = hash_file(self.path(spec.sha256)) == spec.sha256
        except FileNotFoundError:
            intact = False
        if not intact:
            raise damaged_blob(spec, digest)

    def keep_only(self, referenced: set[str]) -> int:
        """Removes all other blobs; their number."""
        with os.scandir(self._folder) as found:
            orphans = [entry.path for entry in found if entry.name not in referenced]
        for orphan in orphans:
            os.unlink(orphan)
        return len(orphans)


def damaged_blob(spec: FileSpec, digest: str) -> DataLossError:
    """What to raise when a file of an adapter is not what its name says."""
    return DataLossError(
        f"stored bytes of {spec.name} of adapter {digest} are damaged (blob {spec.sha256}): "
        "delete the adapter and upload it again",
        digest=digest,
    )
