"""Where a pull takes an adapter's files from: what every source gives, and what it leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

from lorastack.adapters.manifest import FileSpec
from lorastack.adapters.refusal import invalid
from lorastack.adapters.upload import Upload
from lorastack.config import KIB
from lorastack.errors import InvalidArgumentError

PIECE = 512 * KIB  # bytes read from a disk at a time
_NEEDED = (".json", ".safetensors", ".jinja")

Pieces = Generator[bytes, None, None]  # close it when not all are read: a connection may be behind
Alive = Callable[[], None]  # called between pieces; raises when nobody wants the files any more


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file. read: its bytes from an offset on, in pieces; may be called again."""

    spec: FileSpec
    read: Callable[[int], Pieces]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one adapter may have; checked before its bytes are read."""

    max_files: int
    max_bytes: int


def choose(names: Collection[str], where: str) -> list[str]:
    """Those of a folder's plain file names that belong to an adapter, sorted.

    Weights, configs, templates and the README; not the optimizer states, pickles and logs that
    trainers leave beside them. Raises InvalidArgumentError if no weights are there.
    """
    shown = sorted(name for name in names if not name.startswith("."))
    chosen = [name for name in shown if name.endswith(_NEEDED) or name == "README.md"]
    if not any(name.endswith(".safetensors") for name in chosen):
        others = ", ".join(shown[:8])
        raise invalid(
            f"{where} holds no *.safetensors file (it has: {others or 'no files'}); `lorastack "
            "adapters convert` turns .pt and .bin files into safetensors before an upload"
        )
    return chosen


def check_limits(sizes: Collection[int], limits: Limits, where: str) -> None:
    """Raises InvalidArgumentError when these are too many files or bytes."""
    num_files, num_bytes = len(sizes), sum(sizes)
    if num_files > limits.max_files or num_bytes > limits.max_bytes:
        raise InvalidArgumentError(
            f"{where} has {num_files} files of {num_bytes} bytes that an adapter could need; at "
            f"most {limits.max_files} files of {limits.max_bytes} bytes are accepted"
        )


def describe(name: str, size: int, pieces: Pieces, alive: Alive) -> FileSpec:
    """The spec of a file by its bytes; all pieces are read."""
    digest = hashlib.sha256()
    with closing(pieces):
        for piece in pieces:
            digest.update(piece)
            alive()
    return FileSpec(name=name, size=size, sha256=digest.hexdigest())


def pieces_of(file: BinaryIO, offset: int) -> Pieces:
    """The bytes of an open file from an offset on."""
    file.seek(offset)
    while piece := file.read(PIECE):
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
