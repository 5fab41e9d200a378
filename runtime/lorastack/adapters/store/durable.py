"""Files that survive a crash: whole or absent, never half."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorastack.errors import Reason, ResourceExhaustedError

TEMPORARY = ".tmp"  # suffix of files that were never finished


def sync_folder(path: Path) -> None:
    """Makes the folder's entries (creations, renames, removals) durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Atomically replaces a file: after a crash it holds either the old or the new bytes.

    One writer a path at a time.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_full_is_exhaustion(
    message: str = "the store's disk is full: free some space or delete adapters",
) -> Iterator[None]:
    """Turns a full disk or quota, or a limit of file sizes, into ResourceExhaustedError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceExhaustedError(message, reason=Reason.STORE_FULL) from error
        raise
