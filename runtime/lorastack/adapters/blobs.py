"""File bytes by sha256: the finished ones, and those that are still arriving."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lorastack.adapters.durable import disk_full_is_exhaustion, hash_file, sync_folder
from lorastack.adapters.manifest import FileSpec
from lorastack.errors import DataLossError, InvalidArgumentError


class BlobStore:
    """Finished, immutable blobs in one flat folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

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
            raise DataLossError(
                f"stored bytes of {spec.name} of adapter {digest} are damaged (blob "
                f"{spec.sha256}): delete the adapter and upload it again",
                digest=digest,
            )

    def keep_only(self, referenced: set[str]) -> int:
        """Removes all other blobs; their number."""
        with os.scandir(self._folder) as found:
            orphans = [entry.path for entry in found if entry.name not in referenced]
        for orphan in orphans:
            os.unlink(orphan)
        return len(orphans)


class Staging:
    """Blobs of one upload while they arrive, in order of their bytes. Not thread-safe."""

    def __init__(self, folder: Path, needed: Iterable[FileSpec]) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._needed = {spec.sha256: spec for spec in needed}
        self._hashes = {sha256: hashlib.sha256() for sha256 in self._needed}
        self._sizes = dict.fromkeys(self._needed, 0)
        for sha256 in self._needed:
            self.path(sha256).touch()

    @property
    def needed(self) -> frozenset[str]:
        return frozenset(self._needed)

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def write(self, sha256: str, offset: int, data: bytes) -> None:
        """Appends to a blob. Raises InvalidArgumentError for a wrong place or too many bytes."""
        spec = self._needed.get(sha256)
        if spec is None:
            raise InvalidArgumentError(f"blob {sha256[:80]} was not announced")
        if offset != self._sizes[sha256]:
            raise InvalidArgumentError(
                f"{spec.name}: chunk at offset {offset}, but {self._sizes[sha256]} bytes are here"
            )
        if offset + len(data) > spec.size:
            raise InvalidArgumentError(
                f"{spec.name} is longer than the announced {spec.size} bytes"
            )
        with disk_full_is_exhaustion(), self.path(sha256).open("ab") as file:
            file.write(data)
        self._hashes[sha256].update(data)
        self._sizes[sha256] += len(data)

    def finish(self) -> None:
        """Checks every blob and makes its bytes durable. Raises InvalidArgumentError."""
        for sha256, spec in self._needed.items():
            if self._sizes[sha256] != spec.size:
                raise InvalidArgumentError(
                    f"{spec.name}: {self._sizes[sha256]} of {spec.size} bytes arrived"
                )
            if self._hashes[sha256].hexdigest() != sha256:
                raise InvalidArgumentError(f"{spec.name}: the bytes do not have sha256 {sha256}")
            with disk_full_is_exhaustion(), self.path(sha256).open("rb") as file:
                os.fsync(file.fileno())

    def paths(self) -> list[Path]:
        return [self.path(sha256) for sha256 in self._needed]

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
