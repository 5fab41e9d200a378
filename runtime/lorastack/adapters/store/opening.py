"""Opening a store folder: its lock, its format, and the small files that say what it holds."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lorastack.adapters.store.durable import TEMPORARY, replace_file, sync_folder
from lorastack.adapters.store.ids import file_name
from lorastack.adapters.store.manifest import FORMAT, Manifest, Pointer
from lorastack.adapters.store.tables import Tables, manifest_name
from lorastack.errors import FailedPreconditionError, Reason

# Errors of a path that is no folder, or leads through what is none.
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)
_DEFAULT_MEDUSA = "default_medusa.json"
# A folder that changed a moment ago may change again within the same tick of its clock.
_SETTLED_NS = 2_000_000_000

ParsedT = TypeVar("ParsedT")


def lock_store(root: Path) -> int:
    """The descriptor that holds the store's lock until it is closed.

    Raises FailedPreconditionError if another process has the lock, or the folder cannot be made or
    written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in _NO_FOLDER:
            raise FailedPreconditionError(
                f"there can be no store at {root} ({error.strerror}): choose another --store",
                reason=Reason.STORE_FORMAT,
            ) from error
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise FailedPreconditionError(
            f"the store {root} cannot be written ({error.strerror}): serve it with "
            "--read-only-store, or choose another --store",
            reason=Reason.STORE_READ_ONLY,
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise FailedPreconditionError(
            f"another process uses the store {root}: stop it, or choose another --store, or read "
            "this one with --read-only-store",
            reason=Reason.STORE_IN_USE,
        ) from error
    return handle


def prepare_store(root: Path) -> None:
    """Makes the folders, or checks that this version reads them; removes unfinished replacements.

    Raises FailedPreconditionError.
    """
    if not (root / "FORMAT").exists():
        for folder in ("blobs/sha256", "manifests", "ids", "staging"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        sync_folder(root / "blobs")
        replace_file(root / "FORMAT", FORMAT.encode())
    check_format(root)
    for pattern in ("", "ids/", "manifests/"):
        for path in root.glob(f"{pattern}*{TEMPORARY}"):
            path.unlink()


def check_format(root: Path) -> None:
    """Raises FailedPreconditionError unless this version reads the store."""
    path = root / "FORMAT"
    try:
        known = path.read_bytes() == FORMAT.encode()
    except (FileNotFoundError, NotADirectoryError):
        known = False
    if not known:
        raise FailedPreconditionError(
            f"{root} is not a store that this version reads: {path} should say {FORMAT.strip()!r}",
            reason=Reason.STORE_FORMAT,
        )


def write_default(root: Path, reference: str) -> None:
    """Stores the reference of the default heads, durably; "" for none."""
    replace_file(root / _DEFAULT_MEDUSA, json.dumps({"id": reference}).encode() + b"\n")


class TableFiles:
    """The store's small files, read again only where they changed. Used by one thread at a time."""

    def __init__(self, root: Path) -> None:
        """Raises OSError if a folder cannot be read."""
        self._default = root / _DEFAULT_MEDUSA
        self._pointers = _Folder(root / "ids", _parse_pointer)
        self._manifests = _Folder(root / "manifests", _parse_manifest)
        self._tables = self._read()

    def read(self) -> Tables:
        """What the files say now; the same object while they say the same. Raises OSError."""
        # Pointers first: a manifest is there before the first pointer to it.
        changed = [self._pointers.refresh(), self._manifests.refresh()]
        if any(changed) or _read_default(self._default) != self._tables.default_medusa:
            self._tables = self._read()
        return self._tables

    def _read(self) -> Tables:
        pointers, damaged_pointers = self._pointers.parsed()
        manifests, damaged_manifests = self._manifests.parsed()
        return Tables.of(
            pointers={pointer.id: pointer for pointer in pointers},
            manifests={manifest.digest: manifest for manifest in manifests},
            damaged_pointers=damaged_pointers,
            damaged_manifests=damaged_manifests,
            default_medusa=_read_default(self._default),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What opening a store removed, kept and found damaged. All but `damaged` is 0 if read-only."""

    expired_uploads: int = 0  # unfinished, and nobody went on with them
    kept_uploads: int = 0  # unfinished, waiting for the rest
    removed_manifests: int = 0
    removed_blobs: int = 0
    damaged: tuple[str, ...]  # pointer and manifest files that cannot be read

    def __str__(self) -> str:
        return (
            f"removed {self.removed_blobs} blobs and {self.removed_manifests} manifests that no "
            f"adapter needs, and {self.expired_uploads} expired uploads; kept {self.kept_uploads} "
            f"unfinished uploads; damaged files: {', '.join(self.damaged) or 'none'}"
        )


@dataclass(frozen=True, slots=True)
class _File(Generic[ParsedT]):
    """state: changes when the file is replaced. parsed: None for a file that cannot be read."""

    state: tuple[int, int, int]
    parsed: ParsedT | None


class _Folder(Generic[ParsedT]):
    """The finished files of one folder, parsed by parse(name, bytes)."""

    def __init__(self, path: Path, parse: Callable[[str, bytes], ParsedT]) -> None:
        self._path = path
        self._parse = parse
        self._changed_at = -1  # the folder's mtime when it was read
        self._files: dict[str, _File[ParsedT]] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Parses what is new; True if anything is. One `stat` while the folder stays as it is."""
        changed_at = os.stat(self._path).st_mtime_ns
        if changed_at == self._changed_at:
            return False
        files = {}
        with os.scandir(self._path) as entries:
            for entry in entries:
                if not entry.name.endswith(TEMPORARY) and (file := self._file(entry)) is not None:
                    files[entry.name] = file
        settled = time.time_ns() - changed_at > _SETTLED_NS
        self._changed_at = changed_at if settled else -1
        before, self._files = self._files, files
        return files != before

    def parsed(self) -> tuple[list[ParsedT], frozenset[str]]:
        """What the files say, and the names of those that cannot be read."""
        known = [file.parsed for file in self._files.values() if file.parsed is not None]
        return known, frozenset(name for name, file in self._files.items() if file.parsed is None)

    def _file(self, entry: os.DirEntry[str]) -> _File[ParsedT] | None:
        """None if it vanished meanwhile."""
        state = (0, 0, 0)
        try:
            status = entry.stat()
            state = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = self._files.get(entry.name)
            if known is not None and known.state == state:
                return known
            with open(entry.path, "rb") as file:
                return _File(state, self._parse(entry.name, file.read()))
        except FileNotFoundError:
            return None
        except Exception:  # damaged bytes may fail in any way; the callers name the file
            return _File(state, None)


def _read_default(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _parse_pointer(name: str, data: bytes) -> Pointer:
    pointer = Pointer.from_bytes(data)
    if name != file_name(pointer.id):
        raise ValueError("the pointer belongs to another id")
    return pointer


def _parse_manifest(name: str, data: bytes) -> Manifest:
    manifest = Manifest.from_bytes(data)
    if name != manifest_name(manifest.digest):
        raise ValueError("the manifest belongs to another digest")
    return manifest
