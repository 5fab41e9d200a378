"""Adapter folders on a client's machine: which files are sent, how received ones are written."""

from __future__ import annotations

import errno
import hashlib
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from lorastack.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, Reason


def folder_files(folder: Path) -> list[Path]:
    """The files of an adapter's folder, sorted by name. Raises InvalidArgumentError."""
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is not a folder; name the one that holds the adapter")
    paths = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    if not paths:
        raise InvalidArgumentError(f"{folder} holds no files; name the folder of an adapter")
    return sorted(paths)


class NewFolder:
    """A folder that appears whole or not at all, its files checked against their sha256.

    As a context manager; `finish` puts it in its place, without it nothing stays. File by file:
    `begin`, then its bytes by `write`.
    """

    def __init__(self, target: Path) -> None:
        """target: not there yet, or an empty folder. Raises FailedPreconditionError otherwise."""
        self._target = target.resolve()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise _taken(target)

    def __enter__(self) -> Self:
        parent = self._target.parent
        parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename.
        self._staged = parent / f".{self._target.name}.{uuid.uuid4().hex}"
        self._staged.mkdir()
        self._file: BinaryIO | None = None
        self._name = ""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._staged, ignore_errors=True)

    def begin(self, name: str, size: int, sha256: str) -> None:
        """The next file. Raises DataLossError if the one before is not what was announced.

        Names come from the other side, so only plain, new ones are taken (InvalidArgumentError).
        """
        self._end_file()
        plain = name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
        if not plain or (self._staged / name).exists():
            raise InvalidArgumentError(f"the server sent a file named {name[:80]!r}: refused")
        self._name, self._size, self._sha256 = name, size, sha256
        self._digest = hashlib.sha256()
        self._file = (self._staged / name).open("xb")

    def write(self, data: bytes) -> None:
        """More bytes of the file. Raises InvalidArgumentError before the first `begin`."""
        if self._file is None:
            raise InvalidArgumentError("the server sent bytes of no file: refused")
        self._file.write(data)
        self._digest.update(data)

    def finish(self) -> None:
        """Puts the folder in its place. Raises as `begin` does, and when the place was taken."""
        self._end_file()
        try:
            self._staged.rename(self._target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _taken(self._target) from error
            raise

    def _end_file(self) -> None:
        if self._file is None:
            return
        size = self._file.tell()
        self._file.close()
        self._file = None
        if size != self._size or self._digest.hexdigest() != self._sha256:
            raise DataLossError(
                f"{self._name} arrived damaged ({size} of {self._size} bytes, or other ones): "
                "try again"
            )


def _taken(target: Path) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{target} exists and is not an empty folder: name another one, or empty it",
        reason=Reason.INVALID_REQUEST,
    )
