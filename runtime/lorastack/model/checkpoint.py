"""The safetensors of a model folder, single or sharded: what is stored, and reading it in place."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable
from copy import copy
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.model.fetch.download import Progress
from lorastack.modelfiles import check, invalid, parse_object, read_object, shown
from lorastack.tensorheader import TensorEntry, read_header, tensor_entry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER = 100 << 20  # bytes, the limit of the safetensors library
FINGERPRINT_BYTES = 4096  # of either end of a tensor, for the digest
PIECE = 4 << 20  # bytes that are read and converted at once: they stay in the caches
AHEAD = 256 << 20  # bytes that the system is asked to read while those before are worked on


class Checkpoint:
    """An opened checkpoint. tensors: by name; nbytes: of all of them, as stored.

    Raises InvalidArgumentError when files are missing or lie about themselves.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers."""
        self.folder = folder
        self.tensors: dict[str, TensorEntry] = {}
        self._progress: Progress | None = None
        self._num_read = 0
        for file in _files(folder):
            for name, tensor in _read_header(file).items():
                if name in self.tensors:
                    raise invalid(f"{name} is stored in {self.tensors[name].path} and in {file}")
                self.tensors[name] = tensor
                if name.endswith(".qweight"):
                    raise InvalidArgumentError(
                        f"{file} holds weights quantised by GPTQ or AWQ ({name}), which are not "
                        "supported: use the original checkpoint, with --quantize int8 or int4",
                        reason=Reason.UNSUPPORTED_MODEL,
                    )
        self.nbytes = sum(stored.nbytes for stored in self.tensors.values())

    def reporting(self, progress: Progress) -> Checkpoint:
        """The same tensors; `progress` gets the bytes that were read from it, of all there are."""
        reader = copy(self)
        reader._progress, reader._num_read = progress, 0
        return reader

    def find(self, name: str) -> TensorEntry:
        """Raises InvalidArgumentError for a tensor that is not there."""
        if name not in self.tensors:
            raise invalid(f"{self.folder} has no tensor {name}: the checkpoint is incomplete")
        return self.tensors[name]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InvalidArgumentError unless there is such a tensor of this shape to be read."""
        stored = self.find(name)
        if stored.shape != shape:
            raise invalid(f"{name} has shape {stored.shape}, config.json wants {shape}")
        if stored.dtype not in DTYPES:
            raise invalid(
                f"{name} is {stored.dtype}: only {', '.join(DTYPES)} weights are supported"
            )

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out` (its rows contiguous, any device and float dtype) with the tensor `name`.

        A CPU tensor of the stored dtype is read straight into place. Raises what `check` raises,
        and InvalidArgumentError where the file ends early.
        """
        self.check(name, tuple(out.shape))
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        out_X = out.view(-1)
        with stored.path.open("rb", buffering=0) as stream:
            stream.seek(stored.offset)
            _read_ahead(stream, stored.end)
            if out.device.type == "cpu" and out.dtype == dtype:
                self._fill(stream, out_X, name)
            else:
                # In pieces: the whole would be as large as the model's largest matrix, or twice.
                count = PIECE // dtype.itemsize
                turns = _turns(out.device, count, dtype)
                for part_X in torch.split(out_X, count):
                    buffer_X, wait = turns.popleft()
                    wait()
                    piece_X = buffer_X[: len(part_X)]
                    self._fill(stream, piece_X, name)
                    turns.append((buffer_X, _send(piece_X, part_X)))

    def _fill(self, stream: FileIO, out_X: Tensor, name: str) -> None:
        """The stream's next bytes into a tensor on the CPU."""
        buffer = memoryview(out_X.view(torch.uint8).numpy().data)
        while buffer:
            count = stream.readinto(buffer[:PIECE])
            if not count:
                raise invalid(f"{self.folder} ends inside {name}")
            buffer = buffer[count:]
            if self._progress is not None:
                self._num_read += count
                self._progress(self._num_read, self.nbytes)

    def equal(self, name: str, other: str) -> bool:
        """True if two tensors are stored with the same shape, dtype and bytes."""
        one, two = self.find(name), self.find(other)
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        with one.path.open("rb") as stream, two.path.open("rb") as second:
            stream.seek(one.offset)
            second.seek(two.offset)
            for start in range(one.offset, one.end, PIECE):
                size = min(PIECE, one.end - start)
                if stream.read(size) != second.read(size):
                    return False
        return True

    def digest(self) -> bytes:
        """sha256 over every tensor's name, shape, dtype, and first and last bytes."""
        sha = hashlib.sha256()
        for name, stored in sorted(self.tensors.items()):
            sha.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            with stored.path.open("rb") as stream:
                stream.seek(stored.offset)
                sha.update(stream.read(min(FINGERPRINT_BYTES, stored.nbytes)))
                stream.seek(max(stored.offset, stored.end - FINGERPRINT_BYTES))
                sha.update(stream.read(min(FINGERPRINT_BYTES, stored.nbytes)))
        return sha.digest()


Wait = Callable[[], object]  # returns when a buffer may be filled again


def _turns(device: torch.device, count: int, dtype: torch.dtype) -> deque[tuple[Tensor, Wait]]:
    """Buffers of `count` elements that take turns, on CUDA two that are page-locked: while one is
    copied the other is filled."""
    pinned = device.type == "cuda"
    buffers = [torch.empty(count, dtype=dtype, pin_memory=pinned) for _ in range(1 + pinned)]
    return deque((buffer, _at_once) for buffer in buffers)


def _send(piece_X: Tensor, part_X: Tensor) -> Wait:
    """Copies a piece to its place. On CUDA it goes there as it is stored and is converted there."""
    if part_X.device.type != "cuda":
        part_X.copy_(piece_X)
        return _at_once
    part_X.copy_(piece_X.to(part_X.device, non_blocking=True))
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def _at_once() -> None:
    """For a buffer that nothing is read from."""


def _read_ahead(stream: FileIO, position: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), position, AHEAD, os.POSIX_FADV_WILLNEED)


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder, read_object(folder / INDEX).get("weight_map"))
    others = [path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")]
    hint = f"; {others[0]} is a pickle: convert it to safetensors" if others else ""
    raise invalid(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


def _shards(folder: Path, weight_map: object) -> list[Path]:
    """The files that the index names. weight_map: {tensor: file}."""
    path, rule = folder / INDEX, "an object that names a file for each tensor"
    check(isinstance(weight_map, dict) and weight_map != {}, path, "weight_map", rule, weight_map)
    assert isinstance(weight_map, dict)
    there = {entry.name for entry in folder.iterdir() if entry.is_file()}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in there:
            raise invalid(f"{path} names {shown(name)} for {tensor}: no such file in {folder}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensors by name. They may leave gaps, and have dtypes that cannot be read."""
    label = str(file)
    header = read_header(file, label, max_bytes=MAX_HEADER, parse=parse_object, invalid=invalid)
    tensors = {}
    for name, fields in header.tensors.items():
        entry = tensor_entry(file, label, name, fields, header.data_start, invalid)
        if not entry.offset <= entry.end <= header.file_size:
            raise invalid(f"{file}: {name} does not fit its place; is the file truncated?")
        tensors[name] = entry
    return tensors
