"""Finished file bytes by sha256."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lorastack.adapters.store.durable import hash_file, sync_folder
from lorastack.adapters.store.manifest import FileSpec
from lorastack.errors import DataLossError

_DAMAGED = 0  # mtime that marks a damaged blob, also for the next run


class BlobStore:
    """Immutable blobs in one flat folder, changed by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: Counter[str] = Counter()

    def path(self, sha256: str) -> Path:
        """Where a blob is, or would be."""
        return self._folder / sha256

    def has(self, spec: FileSpec) -> bool:
        """True if a file of that name and size is there and `check` has not marked it.

        Its bytes are not read.
        """
        try:
            status = self.path(spec.sha256).stat()
        except FileNotFoundError:
            return False
        return status.st_size == spec.size and status.st_mtime_ns != _DAMAGED

    def adopt(self, paths: Iterable[Path]) -> None:
        """Moves checked, synced files in, named by their sha256; durable when it returns."""
        for path in paths:
            path.replace(self.path(path.name))
        sync_folder(self._folder)

    def check(self, spec: FileSpec, digest: str, *, mark: bool = False) -> None:
        """Raises DataLossError naming the blob if its bytes are gone or changed.

        mark: uploads have to bring a damaged blob again. Its bytes stay: it may have been misread.
        """
        path = self.path(spec.sha256)
        try:
            intact = hash_file(path) == spec.sha256
        except FileNotFoundError:
            intact = False
        if not intact:
            if mark:
                with suppress(OSError):
                    os.utime(path, ns=(_DAMAGED, _DAMAGED))
            raise damaged_blob(spec, digest)

    def hold(self, names: Iterable[str]) -> None:
        """Keeps these blobs through `keep_only`, until they are released as often as held."""
        self._held.update(names)

    def release(self, names: Iterable[str]) -> None:
        """Undoes one `hold` of these blobs."""
        self._held.subtract(names)
        self._held = +self._held

    def keep_only(self, referenced: set[str]) -> tuple[int, int]:
        """Removes all other blobs; (their number, their bytes)."""
        with os.scandir(self._folder) as entries:
            orphans = [
                (entry.path, entry.stat().st_size)
                for entry in entries
                if entry.name not in referenced and entry.name not in self._held
            ]
        for path, _ in orphans:
            os.unlink(path)
        return len(orphans), sum(size for _, size in orphans)


def damaged_blob(spec: FileSpec, digest: str) -> DataLossError:
    """The error for a stored file whose bytes do not have its sha256."""
    return DataLossError(
        f"stored bytes of {spec.name} of adapter {digest} are damaged (blob {spec.sha256}): "
        "upload the adapter again",
        digest=digest,
    )
