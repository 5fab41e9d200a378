"""Writes files that a server sends into a new folder."""

from __future__ import annotations

import errno
import hashlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorastack.client.calls import Progress
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from lorastack.v1 import adapters_pb2


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends; nothing stays if it raises.

    Raises FailedPreconditionError if the target is there already, unless it is an empty folder.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise _taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename.
    staged = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    staged.mkdir()
    try:
        yield staged
        staged.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # taken meanwhile
            raise _taken(target) from error
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class Receiver:
    """Writes files that arrive one after the other: `begin` and `write` for each, then `end`.

    Trusts nothing that is sent: names must be plain and new, and bytes must match their sha256.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None

    def begin(self, name: str, size: int, sha256: str) -> None:
        """Starts the next file. Raises InvalidArgumentError for its name, and as `end`."""
        self.end()
        path = self._folder / name
        plain = name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
        if not plain or path.exists():
            raise InvalidArgumentError(f"the server sent a file named {name[:80]!r}: refused")
        path.touch()
        self._path, self._size, self._sha256 = path, size, sha256
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Appends to the file. Raises InvalidArgumentError before the first `begin`."""
        if self._path is None:
            raise InvalidArgumentError("the server sent bytes of no file: refused")
        with self._path.open("ab") as file:
            file.write(data)
        self._digest.update(data)

    def end(self) -> None:
        """Checks the last file. Raises DataLossError if it is not what was announced."""
        if self._path is None:
            return
        size = self._path.stat().st_size
        if size != self._size or self._digest.hexdigest() != self._sha256:
            raise DataLossError(
                f"{self._path.name} arrived damaged ({size} of {self._size} bytes, or other "
                "ones): try again"
            )
        self._path = None


def receive_files(
    folder: Path,
    parts: Iterable[adapters_pb2.DownloadAdapterResponse],
    total: int,
    progress: Progress | None,
) -> None:
    """Writes the files of a download into a folder. total: their bytes. Raises as `Receiver`."""
    receiver, received = Receiver(folder), 0
    for part in parts:
        if part.WhichOneof("part") == "file":
            receiver.begin(part.file.name, part.file.size, part.file.sha256)
        else:
            receiver.write(part.data)
            received += len(part.data)
        if progress is not None:
            progress(received, total)
    receiver.end()


def _taken(target: Path) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{target} exists and is not an empty folder: name another one, or empty it",
        reason=Reason.INVALID_REQUEST,
    )
