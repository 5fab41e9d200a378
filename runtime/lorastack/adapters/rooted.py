"""An adapter's folder on the server's own disk, read so that nothing outside the roots can be.

Every path is resolved first and must lie under a root; then it is opened component by component
without following links, so that a link swapped in between is refused, not followed. Links that
stay under the roots work (the Hugging Face cache is made of them).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lorastack.adapters.source import (
    Alive,
    Limits,
    SourceFile,
    check_limits,
    choose,
    describe,
    pieces_of,
)
from lorastack.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError

# O_NONBLOCK: opening a pipe must not wait for its writer.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def open_folder(
    folder: str, roots: Sequence[Path], limits: Limits, alive: Alive
) -> Iterator[list[SourceFile]]:
    """The files of an adapter's folder, readable until the context ends.

    Raises InvalidArgumentError for a path that is not absolute, a folder without weights or one
    beyond the limits; PermissionDeniedError for what lies outside the roots, whether it exists or
    not; NotFoundError for what is not there.
    """
    if not os.path.isabs(folder) or "\0" in folder:
        raise InvalidArgumentError(
            f"the folder {folder[:200]!r} must be an absolute path of the server's machine",
            field="folder",
        )
    with ExitStack() as open_files:
        handle = _open(folder, roots, os.O_DIRECTORY)
        try:
            names = os.listdir(handle)
        finally:
            os.close(handle)
        opened = {
            name: open_files.enter_context(_open_file(os.path.join(folder, name), roots))
            for name in choose(names, folder)
        }
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in opened.items()}
        check_limits(sizes.values(), limits, folder)
        yield [
            SourceFile(
                spec=describe(name, sizes[name], pieces_of(file, 0), alive),
                read=partial(pieces_of, file),
            )
            for name, file in opened.items()
        ]


def _open_file(path: str, roots: Sequence[Path]) -> BinaryIO:
    handle = _open(path, roots, 0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidArgumentError(f"{path} is not a regular file: take it out of the folder")
    return os.fdopen(handle, "rb")


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
