"""Bytes of uploads on their way in: kept when a connection breaks, so that a later try goes on."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lorastack.adapters.durable import disk_full_is_exhaustion, hash_file
from lorastack.adapters.manifest import FileSpec
from lorastack.errors import InvalidArgumentError

STAGING_EXPIRES = 24 * 3600.0  # seconds since the last byte


def staging_key(adapter_id: str, files: Sequence[FileSpec]) -> str:
    """Names an upload's folder: only the same files under the same id go on from its bytes."""
    lines = sorted(f"{spec.name}\0{spec.size}\0{spec.sha256}\0" for spec in files)
    return hashlib.sha256(f"{adapter_id}\0{''.join(lines)}".encode()).hexdigest()


def staged_sizes(folder: Path, needed: Iterable[FileSpec]) -> dict[str, int]:
    """sha256 -> how many bytes of it are here; the folder need not exist."""
    return {spec.sha256: _staged_size(folder / spec.sha256, spec.size) for spec in needed}


def staging_bytes(root: Path) -> int:
    """Bytes of all unfinished uploads."""
    total = 0
    for path in root.rglob("*"):
        with suppress(OSError):  # it may have just gone
            total += path.stat().st_size if path.is_file() else 0
    return total


def expire_staging(root: Path, in_use: Collection[str]) -> tuple[int, int]:
    """Removes the uploads nobody went on with; (removed, kept). in_use: keys that stay."""
    removed = kept = 0
    for folder in list(root.iterdir()):
        if folder.name in in_use or time.time() - _last_change(folder) < STAGING_EXPIRES:
            kept += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed, kept


class Staging:
    """The blobs of one upload while they arrive, each in order of its bytes. Not thread-safe.

    Nothing is known about bytes that an earlier try left, so `finish` hashes what is on the disk.
    """

    def __init__(self, folder: Path, needed: Iterable[FileSpec]) -> None:
        """Goes on from the bytes that are in the folder. Raises OSError."""
        self._folder = folder
        self._needed = {spec.sha256: spec for spec in needed}
        self._sizes = staged_sizes(folder, self._needed.values())
        self._arriving: set[str] = set()  # what this try wrote to
        folder.mkdir(exist_ok=True)
        for sha256, size in self._sizes.items():
            self.path(sha256).open("ab" if size else "wb").close()

    @property
    def needed(self) -> frozenset[str]:
        return frozenset(self._needed)

    @property
    def sizes(self) -> Mapping[str, int]:
        """sha256 -> how many of its bytes are here."""
        return self._sizes

    @property
    def num_missing(self) -> int:
        """Bytes still to come."""
        return sum(spec.size - self._sizes[spec.sha256] for spec in self._needed.values())

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def write(self, sha256: str, offset: int, data: bytes) -> None:
        """Appends to a blob; the first chunk may overlap with bytes of an earlier try.

        Raises InvalidArgumentError for a wrong place or too many bytes, ResourceExhaustedError.
        """
        spec, size = self._needed[sha256], self._sizes[sha256]
        overlaps = offset < size and sha256 not in self._arriving
        if offset != size and not overlaps:
            raise InvalidArgumentError(
                f"{spec.name}: chunk at offset {offset}, but {size} bytes are here"
            )
        if offset + len(data) > spec.size:
            raise InvalidArgumentError(
                f"{spec.name} is longer than the announced {spec.size} bytes"
            )
        with disk_full_is_exhaustion(), self.path(sha256).open("r+b") as file:
            file.seek(offset)
            file.write(data)
        self._arriving.add(sha256)
        self._sizes[sha256] = offset + len(data)

    def finish(self) -> None:
        """Checks every blob and makes its bytes durable. Raises InvalidArgumentError."""
        for sha256, spec in self._needed.items():
            if self._sizes[sha256] != spec.size:
                raise InvalidArgumentError(
                    f"{spec.name}: {self._sizes[sha256]} of {spec.size} bytes arrived"
                )
            if hash_file(self.path(sha256)) != sha256:
                raise InvalidArgumentError(f"{spec.name}: the bytes do not have sha256 {sha256}")
            with disk_full_is_exhaustion(), self.path(sha256).open("rb") as file:
                os.fsync(file.fileno())

    def paths(self) -> list[Path]:
        return [self.path(sha256) for sha256 in self._needed]

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _staged_size(path: Path, size: int) -> int:
    """0 for a file that is longer than it may be: it is not worth a look."""
    try:
        staged = path.stat().st_size
    except FileNotFoundError:
        return 0
    return staged if staged <= size else 0


def _last_change(folder: Path) -> float:
    """The newest mtime of a folder and its files, in seconds since the epoch."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # vanished, or not ours: old enough to go
        return 0.0
