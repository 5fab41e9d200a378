"""A folder that is made once a machine, however many processes ask and whenever they are killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "complete.json"  # written last: the names and sizes of the folder's files


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, first having `build` fill an empty staging folder if it is not complete.

    The staging folder becomes `folder` by a rename, once every file is on disk. What a killed
    process left is thrown away. Other processes wait for the one that builds.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if is_complete(folder):
            return folder
        staging = folder.with_name(f"{folder.name}.staging")
        for leftover in (staging, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        build(staging)
        _seal(staging)
        staging.rename(folder)
        _sync(folder.parent)
    return folder


def is_complete(folder: Path) -> bool:
    """True if every file that the marker lists is there with its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _seal(folder: Path) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files:
        _sync(path)
    marker = folder / MARKER
    marker.write_text(json.dumps({path.name: path.stat().st_size for path in files}))
    _sync(marker)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
