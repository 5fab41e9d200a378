"""Where a pull takes an adapter's files from: what every source gives, and what it leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

from lorastack.adapters.store.manifest import FileSpec
from lorastack.adapters.store.upload import Upload
from lorastack.config import KIB
from lorastack.errors import InvalidArgumentError

PIECE = 512 * KIB  # bytes read from a disk at a time

Pieces = Generator[bytes, None, None]  # close it when not all are read: a connection may be behind
Alive = Callable[[], None]  # called between pieces; raises when nobody wants the files any more


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file. read: its bytes from an offset on, in pieces; may be called again."""

    spec: FileSpec
    read: Callable[[int], Pieces]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files of one adapter. left_out: names of what lies beside them and is not taken."""

    files: Sequence[SourceFile]
    left_out: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one adapter may have; checked before its bytes are read."""

    max_files: int
    max_bytes: int


def check_limits(sizes: Collection[int], limits: Limits, where: str) -> None:
    """Raises InvalidArgumentError when these are too many files or bytes."""
    check_number(len(sizes), limits, where)
    if (num_bytes := sum(sizes)) > limits.max_bytes:
        raise InvalidArgumentError(
            f"{where} has {num_bytes} bytes that an adapter could need; at most "
            f"{limits.max_bytes} are accepted"
        )


def check_number(num_files: int, limits: Limits, where: str) -> None:
    """Raises InvalidArgumentError when these are too many files."""
    if num_files > limits.max_files:
        raise InvalidArgumentError(
            f"{where} has {num_files} files that an adapter could need; at most "
            f"{limits.max_files} are accepted: take out what does not belong to it"
        )


def describe(name: str, size: int, pieces: Pieces, alive: Alive) -> FileSpec:
    """The spec of a file by its bytes; all pieces are read.

    Raises InvalidArgumentError if they are not `size` bytes any more.
    """
    sha256, num_read = hashlib.sha256(), 0
    with closing(pieces):
        for piece in pieces:
            sha256.update(piece)
            num_read += len(piece)
            alive()
    if num_read != size:
        raise InvalidArgumentError(f"{name} changed while it was read: try again when it is whole")
    return FileSpec(name=name, size=size, sha256=sha256.hexdigest())


def pieces_of(file: BinaryIO, size: int, offset: int) -> Pieces:
    """The bytes of an open file from an offset on, up to this size: it may still grow."""
    file.seek(offset)
    while piece := file.read(min(PIECE, size - offset)):
        offset += len(piece)
        yield piece


def copy_missing(
    files: Sequence[SourceFile], upload: Upload, report: Callable[[int, int], None]
) -> None:
    """Writes what the store lacks, going on behind what an earlier try left.

    report: gets the bytes done and those in all; what it raises ends the copy.
    """
    by_sha256 = {file.spec.sha256: file for file in files}
    done = total = sum(file.spec.size for file in by_sha256.values())
    done -= upload.num_missing
    report(done, total)
    for sha256, staged in list(upload.staged.items()):
        offset = staged
        with closing(by_sha256[sha256].read(staged)) as pieces:
            for piece in pieces:
                upload.write(sha256, offset, piece)
                offset += len(piece)
                done += len(piece)
                report(done, total)
