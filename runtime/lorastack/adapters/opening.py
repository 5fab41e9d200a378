"""Opening a store folder: its lock, its format, and the tables it holds."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lorastack.adapters.durable import TEMPORARY, replace_file, sync_folder
from lorastack.adapters.ids import file_name
from lorastack.adapters.manifest import FORMAT, Manifest, Pointer
from lorastack.errors import FailedPreconditionError, Reason


@dataclass(slots=True, kw_only=True)
class Tables:
    """What the store's small files say, in memory."""

    pointers: dict[str, Pointer] = field(default_factory=dict)  # by id
    manifests: dict[str, Manifest] = field(default_factory=dict)  # by digest
    damaged_pointers: set[str] = field(default_factory=set)  # file names that cannot be read
    damaged_manifests: set[str] = field(default_factory=set)


def lock_store(root: Path) -> int:
    """The descriptor that holds the store's lock until it is closed.

    Raises FailedPreconditionError if another process has it.
    """
    handle = os.open(root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise FailedPreconditionError(
            f"another process uses the store {root}: stop it, or choose another --store",
            reason=Reason.STORE_IN_USE,
        ) from error
    return handle


def prepare_store(root: Path) -> None:
    """Makes the folders, or checks that this version reads them."""
    path = root / "FORMAT"
    if not path.exists():
        for folder in ("blobs/sha256", "manifests", "ids", "staging"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        sync_folder(root / "blobs")
        replace_file(path, FORMAT.encode())
    elif path.read_bytes() != FORMAT.encode():
        raise FailedPreconditionError(
            f"{root} is not a store that this version reads: {path} should say {FORMAT.strip()!r}",
            reason=Reason.STORE_FORMAT,
        )


def clear_staging(root: Path) -> int:
    """Removes unfinished uploads; their number."""
    folders = list((root / "staging").iterdir())
    for folder in folders:
        shutil.rmtree(folder)
    return len(folders)


def read_tables(root: Path) -> Tables:
    """All pointers and manifests. Files that cannot be read are named, not removed."""
    tables = Tables()
    for path in _finished(root / "ids"):
        try:
            pointer = Pointer.from_bytes(path.read_bytes())
            if path.name != file_name(pointer.id):
                raise ValueError("the pointer belongs to another id")
            tables.pointers[pointer.id] = pointer
        except (ValueError, KeyError, TypeError):
            tables.damaged_pointers.add(path.name)
    for path in _finished(root / "manifests"):
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
            if path.name != manifest_name(manifest.digest):
                raise ValueError("the manifest belongs to another digest")
            tables.manifests[manifest.digest] = manifest
        except (ValueError, KeyError, TypeError):
            tables.damaged_manifests.add(path.name)
    return tables


def manifest_name(digest: str) -> str:
    return digest.removeprefix("sha256:") + ".json"


def _finished(folder: Path) -> Iterator[Path]:
    """The folder's files, except replacements that never happened, which are removed."""
    for path in list(folder.iterdir()):
        if path.name.endswith(TEMPORARY):
            path.unlink()
        else:
            yield path
