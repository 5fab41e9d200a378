"""Bytes of uploads on their way in: kept when a connection breaks, so that a later try goes on.

Nothing is made on the disk before an upload's first byte. Memory knows all that is there: the
folder is walked once, when the store is opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from lorastack.adapters.store.durable import disk_full_is_exhaustion, hash_file
from lorastack.adapters.store.manifest import FileSpec
from lorastack.errors import AbortedError, InvalidArgumentError, Reason, ResourceExhaustedError

STAGING_EXPIRES = 24 * 3600.0  # seconds since the last byte
MAX_WAITING = 256  # uploads of all callers that wait to be resumed
RETRY_SECONDS = 10.0  # after which a caller that finds no room should try again


def staging_key(adapter_id: str, files: Sequence[FileSpec]) -> str:
    """The name of an upload's folder: only the same files under the same id resume from it."""
    lines = sorted(f"{spec.name}\0{spec.size}\0{spec.sha256}\0" for spec in files)
    return hashlib.sha256(f"{adapter_id}\0{''.join(lines)}".encode()).hexdigest()


@dataclass(slots=True)
class _Staged:
    """What one upload has on the disk. changed_at: its last byte's, in seconds since the epoch."""

    caller: str
    num_bytes: int
    changed_at: float
    running: bool


class StagingArea:
    """All unfinished uploads of a store. Any thread may call anything.

    Uploads that wait to be resumed are dropped when there are too many of them, or when a running
    one needs their room: first the uploads of the caller that holds the most bytes.
    """

    def __init__(self, root: Path, *, max_bytes: int, max_bytes_per_caller: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._max_bytes_per_caller = max_bytes_per_caller
        self._lock = Lock()
        self._staged: dict[str, _Staged] = {}
        self._held: Counter[str] = Counter()  # bytes of all uploads, by caller
        self._num_bytes = 0  # of all callers

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk, of all uploads."""
        return self._num_bytes

    def recover(self) -> tuple[int, int]:
        """Takes in what an earlier run left; (uploads removed, uploads kept). Called once."""
        for folder in list(self._root.iterdir()):
            num_bytes, changed_at = _bytes_and_change(folder)
            self._staged[folder.name] = _Staged("", 0, changed_at, running=False)
            self._add(folder.name, num_bytes)
        num_left = len(self._staged)
        self.expire()
        with self._lock:
            self._reduce()
            while self._num_bytes > self._max_bytes:
                self._make_room()
        return num_left - len(self._staged), len(self._staged)

    def sizes(self, key: str, needed: Iterable[FileSpec]) -> dict[str, int]:
        """sha256 -> how many bytes of it an upload has here."""
        with self._lock:
            known = key in self._staged
        folder = self._root / key
        return {
            spec.sha256: _size(folder / spec.sha256, spec.size) if known else 0 for spec in needed
        }

    def open(self, key: str, needed: Iterable[FileSpec], caller: str) -> Staging:
        """Starts or resumes an upload; its `close` ends it."""
        with self._lock:
            if (upload := self._staged.get(key)) is not None:
                self._held[upload.caller] -= upload.num_bytes
                self._held[caller] += upload.num_bytes
                upload.running, upload.caller = True, caller
        needed = tuple(needed)
        return Staging(self, key, needed, self.sizes(key, needed), caller)

    def close(self, key: str, *, keep: bool) -> None:
        """Ends an upload; keep: its bytes wait for the next try."""
        with self._lock:
            upload = self._staged.get(key)
            if upload is None:
                return
            upload.running = False
            if not keep:
                self._drop(key)
                return
            self._reduce()

    def expire(self) -> int:
        """Drops waiting uploads that are too old or have no bytes; their number."""
        with self._lock:
            before = time.time() - STAGING_EXPIRES
            waiting = dict(self._waiting())
            old = [
                key
                for key, upload in waiting.items()
                if upload.changed_at <= before or not upload.num_bytes
            ]
            for key in old:
                self._drop(key)
            return len(old)

    def folder(self, key: str) -> Path:
        """Where an upload's blobs lie, or would."""
        return self._root / key

    def reserve(self, key: str, caller: str, num_bytes: int) -> None:
        """Makes room for bytes that a running upload is about to write.

        Raises ResourceExhaustedError if running uploads take all of it.
        """
        with self._lock:
            while self._held[caller] + num_bytes > self._max_bytes_per_caller:
                self._make_room(caller)
            while self._num_bytes + num_bytes > self._max_bytes:
                self._make_room()
            if key not in self._staged:
                self._staged[key] = _Staged(caller, 0, 0.0, running=True)
            self._staged[key].changed_at = time.time()
            self._add(key, num_bytes)

    def _reduce(self) -> None:
        """While too many uploads wait: drops the smallest of the caller with the most of them."""
        while len(waiting := dict(self._waiting())) > MAX_WAITING:
            callers = Counter(upload.caller for upload in waiting.values())
            most = callers.most_common(1)[0][0]
            theirs = [key for key in waiting if waiting[key].caller == most]
            self._drop(min(theirs, key=lambda key: _loss(waiting[key])))

    def _make_room(self, caller: str | None = None) -> None:
        """Drops the oldest waiting upload of the caller; None: of the one with the most bytes."""
        waiting = dict(self._waiting())
        if caller is None:
            callers = {upload.caller for upload in waiting.values()}
            caller = max(callers, key=self._held.__getitem__, default="")
        theirs = [key for key in waiting if waiting[key].caller == caller]
        if not theirs:
            raise ResourceExhaustedError(
                "unfinished uploads take all the room there is for them: try again, what has "
                "arrived is kept",
                reason=Reason.STAGING_FULL,
                retry_after=RETRY_SECONDS,
            )
        self._drop(min(theirs, key=lambda key: waiting[key].changed_at))

    def _waiting(self) -> Iterator[tuple[str, _Staged]]:
        return ((key, upload) for key, upload in self._staged.items() if not upload.running)

    def _add(self, key: str, num_bytes: int) -> None:
        upload = self._staged[key]
        upload.num_bytes += num_bytes
        self._held[upload.caller] += num_bytes
        self._num_bytes += num_bytes

    def _drop(self, key: str) -> None:
        shutil.rmtree(self._root / key, ignore_errors=True)
        self._add(key, -self._staged[key].num_bytes)
        caller = self._staged.pop(key).caller
        if not self._held[caller]:
            del self._held[caller]


class Staging:
    """The blobs of one upload while they arrive, each in order of its bytes. Not thread-safe.

    Bytes of an earlier try may be damaged, so `finish` hashes what is on the disk.
    """

    def __init__(
        self,
        area: StagingArea,
        key: str,
        needed: Iterable[FileSpec],
        sizes: dict[str, int],
        caller: str,
    ) -> None:
        """sizes: sha256 of each needed blob -> how many of its bytes are here."""
        self._area = area
        self._key = key
        self._caller = caller
        self._folder = area.folder(key)
        self._needed = {spec.sha256: spec for spec in needed}
        self._sizes = sizes
        self._on_disk = dict(sizes)  # more than `sizes` where a caller sends bytes again
        self._arriving: set[str] = set()  # blobs that this try wrote to

    @property
    def needed(self) -> frozenset[str]:
        """sha256 of the blobs that must be written."""
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
        """Where a blob of this upload is staged."""
        return self._folder / sha256

    def write(self, sha256: str, offset: int, data: bytes) -> None:
        """Appends to a blob; the first chunk may overlap with bytes of an earlier try.

        Raises InvalidArgumentError for a wrong place or too many bytes, AbortedError for a first
        chunk behind bytes that are no longer here, ResourceExhaustedError for lack of room.
        """
        spec, size = self._needed[sha256], self._sizes[sha256]
        first = sha256 not in self._arriving
        if offset != size and not (first and offset < size):
            where = f"{spec.name}: chunk at offset {offset}, but {size} bytes are here"
            if first:  # they were dropped to make room, or expired, since the caller planned
                raise AbortedError(f"{where}: upload it again", reason=Reason.UPLOAD_INCOMPLETE)
            raise InvalidArgumentError(where)
        if offset + len(data) > spec.size:
            raise InvalidArgumentError(
                f"{spec.name} is longer than the announced {spec.size} bytes"
            )
        self._arriving.add(sha256)
        if not data:
            return
        end, on_disk = offset + len(data), self._on_disk[sha256]
        self._area.reserve(self._key, self._caller, max(end - on_disk, 0))
        with disk_full_is_exhaustion():
            self._folder.mkdir(exist_ok=True)
            with self.path(sha256).open("r+b" if on_disk else "wb") as file:
                file.seek(offset)
                file.write(data)
        self._sizes[sha256] = end
        self._on_disk[sha256] = max(end, on_disk)

    def finish(self) -> None:
        """Checks every blob and makes its bytes durable. Raises InvalidArgumentError."""
        for sha256, spec in self._needed.items():
            if self._sizes[sha256] != spec.size:
                raise InvalidArgumentError(
                    f"{spec.name}: {self._sizes[sha256]} of {spec.size} bytes arrived"
                )
            if not spec.size:
                self._make_empty(sha256)
            if hash_file(self.path(sha256)) != sha256:
                raise InvalidArgumentError(f"{spec.name}: the bytes do not have sha256 {sha256}")
            with disk_full_is_exhaustion(), self.path(sha256).open("rb") as file:
                os.fsync(file.fileno())

    def paths(self) -> list[Path]:
        """The paths of all needed blobs."""
        return [self.path(sha256) for sha256 in self._needed]

    def close(self, *, keep: bool) -> None:
        """Ends the upload; keep: a later one may resume it."""
        self._area.close(self._key, keep=keep)

    def _make_empty(self, sha256: str) -> None:
        self._area.reserve(self._key, self._caller, 0)
        with disk_full_is_exhaustion():
            self._folder.mkdir(exist_ok=True)
            self.path(sha256).open("wb").close()


def _size(path: Path, size: int) -> int:
    """Bytes of a file; 0 for one that is longer than `size`, which cannot be right."""
    try:
        staged = path.stat().st_size
    except FileNotFoundError:
        return 0
    return staged if staged <= size else 0


def _bytes_and_change(folder: Path) -> tuple[int, float]:
    """A folder's bytes and its last change: 0 if it is empty or no folder, so that it expires."""
    try:
        files = [path.stat() for path in folder.iterdir()]
    except OSError:
        files = []
    changed_at = max((file.st_mtime for file in files), default=0.0)
    return sum(file.st_size for file in files), changed_at


def _loss(upload: _Staged) -> tuple[int, float]:
    """Orders waiting uploads by what is lost with them."""
    return upload.num_bytes, upload.changed_at
