"""An adapter's folder on the server's own disk, read so that no file outside the roots is.

Every path is resolved first and must lie under a root; then it is opened component by component
without following links, so that a link swapped in between is refused, not followed. Links that
stay under the roots work (the Hugging Face cache is made of them).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from lorastack.adapters.sources.base import (
    Alive,
    Limits,
    Pieces,
    Source,
    SourceFile,
    check_limits,
    check_number,
    describe,
    pieces_of,
)
from lorastack.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from lorastack.folders import choose

MAX_ENTRIES = 10_000  # a folder with more is refused
# O_NONBLOCK: opening a pipe must not wait for its writer.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def find_files(folder: str, roots: Sequence[Path], limits: Limits, alive: Alive) -> Source:
    """The files of an adapter's folder. One is open at a time, while it is described or read.

    Raises InvalidArgumentError for a path that is not absolute, a folder without weights or one
    beyond the limits; PermissionDeniedError for what lies outside the roots, whether it exists or
    not; NotFoundError for what is not there.
    """
    if not os.path.isabs(folder) or "\0" in folder:
        raise InvalidArgumentError(
            f"the folder {folder[:200]!r} must be an absolute path of the server's machine",
            field="folder",
        )
    chosen = choose(
        _names(folder, roots), folder, lambda name: _names(os.path.join(folder, name), roots)
    )
    check_number(len(chosen.files), limits, folder)
    sizes = {}
    for name in chosen.files:
        with _open_file(os.path.join(folder, name), roots) as file:
            sizes[name] = os.fstat(file.fileno()).st_size
    check_limits(sizes.values(), limits, folder)
    files = []
    for name, size in sizes.items():
        read = partial(_pieces, os.path.join(folder, name), roots, size)
        files.append(SourceFile(spec=describe(name, size, read(0), alive), read=read))
    return Source(files=files, left_out=chosen.left_out)


def _names(folder: str, roots: Sequence[Path]) -> list[str]:
    """Names of what a folder holds, those of folders with a slash at the end."""
    handle = _open(folder, roots, os.O_DIRECTORY)
    try:
        with os.scandir(handle) as entries:
            # Links are not followed here: what they lead to may be none of the caller's business.
            names = [
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in islice(entries, MAX_ENTRIES + 1)
            ]
    finally:
        os.close(handle)
    if len(names) > MAX_ENTRIES:
        raise InvalidArgumentError(
            f"{folder} holds more than {MAX_ENTRIES} files: put the adapter's into one of their own"
        )
    return names


def _pieces(path: str, roots: Sequence[Path], size: int, offset: int) -> Pieces:
    with _open_file(path, roots) as file:
        yield from pieces_of(file, size, offset)


def _open_file(path: str, roots: Sequence[Path]) -> BinaryIO:
    handle = _open(path, roots, 0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_regular(path)
    return os.fdopen(handle, "rb")


def _not_regular(path: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} is not a regular file: take it out of the folder")


def _open(path: str, roots: Sequence[Path], flags: int) -> int:
    """A descriptor of what the path leads to, if that lies under a root."""
    target = Path(os.path.realpath(path))
    root = next((root for root in map(_real, roots) if target.is_relative_to(root)), None)
    if root is None:
        raise PermissionDeniedError(
            f"{path[:200]} lies outside the folders that this server pulls from; whoever runs it "
            "allows more with --pull-root DIR",
            folder=path,
        )
    try:
        return _open_beneath(root, target.relative_to(root).parts, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"{path[:200]}: {error.strerror} on the server's machine", folder=path
        ) from error
    except OSError as error:  # no permission, or a link that was not there a moment ago
        if error.errno == errno.ENXIO:  # a socket
            raise _not_regular(path) from error
        raise PermissionDeniedError(
            f"the server cannot read {path[:200]} ({error.strerror}); make it readable for it",
            folder=path,
        ) from error


def _open_beneath(root: Path, parts: Sequence[str], flags: int) -> int:
    """Opens root/parts, which hold no links and no dots, following no link on the way."""
    handle = os.open(root, _FLAGS | os.O_DIRECTORY)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        parent = handle
        try:
            handle = os.open(part, _FLAGS | (flags if last else os.O_DIRECTORY), dir_fd=parent)
        finally:
            os.close(parent)
    return handle


def _real(root: Path) -> Path:
    return Path(os.path.realpath(root))
