"""Reads stored files into an adapter's buffer in one pass: reading, hashing and unpacking overlap.

A few chunks are reused: while the calling thread reads one, two helper threads hash those before it
and copy their values to their places. Helpers inherit the caller's priority, which Linux keeps per
thread; nothing here uses OpenMP or holds the GIL for longer than a few calls.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorastack.adapters.formats.dtypes import DTYPES
from lorastack.tensorheader import TensorEntry

CHUNK = 4 << 20  # bytes
CHUNKS = 4  # buffers of CHUNK bytes
GRAIN = 1 << 15  # elements: torch copies more than these at once with its OpenMP threads

Bytes = npt.NDArray[np.uint8]
Place = tuple[TensorEntry, Tensor]  # a stored tensor, and the flat view that its values go to


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring bytes of a file: values of one dtype, or what has no place (a header)."""

    nbytes: int
    dtype: torch.dtype = torch.uint8
    target: Tensor | None = None


def fill(paths: Sequence[Path], places: Sequence[Place]) -> list[str]:
    """Reads whole files, writes the values of `places` and returns each file's sha256.

    places: tensors of these files, in any order; a target has its tensor's number of elements and
    any float dtype. A file that ends early leaves the rest of its targets as they were: its sha256
    tells. Raises FileNotFoundError.
    """
    digests = []
    chunks = cycle([np.empty(CHUNK, dtype=np.uint8) for _ in range(CHUNKS)])
    # One thread each: a hash takes its chunks in order.
    with (
        ThreadPoolExecutor(1, "adapter-hashing") as hashing,
        ThreadPoolExecutor(1, "adapter-unpacking") as unpacking,
    ):
        for path in paths:
            sha256 = hashlib.sha256()
            mine = [place for place in places if place[0].path == path]
            running: deque[tuple[Future[None], Future[None]]] = deque()
            with path.open("rb", buffering=0) as file:
                # The disk works ahead, so that a chunk is there when its turn comes.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                for batch in _batches(os.fstat(file.fileno()).st_size, mine):
                    if len(running) == CHUNKS - 1:
                        _wait(running.popleft())
                    size = sum(piece.nbytes for piece in batch)
                    data = _read(file, next(chunks)[:size])
                    running.append(
                        (
                            hashing.submit(sha256.update, data.data),
                            unpacking.submit(_unpack, data, batch),
                        )
                    )
            for pair in running:
                _wait(pair)
            digests.append(sha256.hexdigest())
    return digests


def _wait(running: Sequence[Future[None]]) -> None:
    for future in running:
        future.result()


def _read(file: FileIO, chunk: Bytes) -> Bytes:
    """As much of the chunk as the file fills."""
    done = 0
    while done < len(chunk) and (count := file.readinto(chunk[done:].data)):
        done += count
    return chunk[:done]


def _unpack(data: Bytes, batch: Sequence[_Piece]) -> None:
    """Copies the batch's values to their targets, converting dtypes."""
    start = 0
    for piece in batch:
        end = start + piece.nbytes
        if piece.target is not None and end <= len(data):
            values = torch.from_numpy(data[start:end])
            if start % piece.dtype.itemsize:
                values = values.clone()  # aligned
            sources = torch.split(values.view(piece.dtype), GRAIN)
            for source, target in zip(sources, torch.split(piece.target, GRAIN), strict=True):
                target.copy_(source)
        start = end


def _batches(size: int, places: Sequence[Place]) -> Iterator[list[_Piece]]:
    """A file of `size` bytes as runs of pieces that fit a chunk."""
    batch: list[_Piece] = []
    room = CHUNK
    for piece in _pieces(size, places):
        if piece.nbytes > room:
            yield batch
            batch, room = [], CHUNK
        batch.append(piece)
        room -= piece.nbytes
    yield batch


def _pieces(size: int, places: Sequence[Place]) -> Iterator[_Piece]:
    """All bytes of a file in order. No piece is larger than a chunk or cuts a value in two."""
    position = 0
    # An empty tensor lies before the one that begins at the same place.
    for entry, target in sorted(places, key=lambda place: (place[0].offset, place[0].nbytes)):
        yield from _cut(_Piece(entry.offset - position))
        yield from _cut(_Piece(entry.nbytes, DTYPES[entry.dtype], target))
        position = entry.offset + entry.nbytes
    yield from _cut(_Piece(size - position))


def _cut(piece: _Piece) -> Iterator[_Piece]:
    for start in range(0, piece.nbytes, CHUNK):
        end = min(start + CHUNK, piece.nbytes)
        target = piece.target
        if target is not None:
            target = target[start // piece.dtype.itemsize : end // piece.dtype.itemsize]
        yield _Piece(end - start, piece.dtype, target)
