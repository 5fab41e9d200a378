"""A shard's view of a checkpoint: its tensors are the shard's parts, and no more is read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from io import FileIO
from math import prod
from typing import Any

import torch
from torch import Tensor

from lorastack.kernels.linear import copy_rows
from lorastack.model.backends.parallel.shards import BY_INPUTS, Shard
from lorastack.model.checkpoint import DTYPES, Checkpoint
from lorastack.model.weights import EMBED_WEIGHT, LM_HEAD_WEIGHT, MODULES
from lorastack.tensorheader import TensorEntry


class CheckpointShard(Checkpoint):
    """See `Checkpoint`; the tensors have the shapes that `shard_config` gives them."""

    def __init__(self, whole: Checkpoint, shard: Shard) -> None:
        """Reads nothing."""
        vars(self).update(vars(whole))
        self._whole = whole
        self._strides: dict[str, int] = {}  # bytes from row to row of a tensor cut by its inputs
        self.tensors = {name: self._cut(entry, shard) for name, entry in whole.tensors.items()}
        self.nbytes = sum(entry.nbytes for entry in self.tensors.values())

    def read_into(self, name: str, out: Tensor) -> None:
        """See `Checkpoint`. A tensor without bytes is a bias that another shard adds: zeros."""
        if self.find(name).nbytes:
            super().read_into(name, out)
        else:
            out.zero_()

    def read_rows(self, name: str, ids: Sequence[int], out_NI: Tensor) -> None:
        """Rows of the whole tensor, whatever the shard, into a tensor on any device. Any thread."""
        entry = self._whole.find(name)
        reader = copy(self._whole)  # which reports no progress
        reader._progress = None
        nbytes = entry.nbytes // entry.shape[0]

        def read(ids_N: Tensor) -> Tensor:
            rows_NI = torch.empty(len(ids_N), entry.shape[1], dtype=DTYPES[entry.dtype])
            for row_I, row in zip(rows_NI, ids_N.tolist(), strict=True):
                stream.seek(entry.offset + row * nbytes)
                reader._fill(stream, row_I, name)
            return rows_NI.to(out_NI.device)

        with reader._open(entry) as stream:
            copy_rows(read, torch.tensor(ids), out_NI)

    def _open(self, stored: TensorEntry) -> FileIO:
        stride = self._strides.get(stored.name)
        if stride is None:
            return super()._open(stored)
        return _Columns(stored, stride)

    def _cut(self, entry: TensorEntry, shard: Shard) -> TensorEntry:
        """The entry of the shard's part."""
        path, _, kind = entry.name.rpartition(".")
        target = path.rpartition(".")[2]
        by_rows = entry.name in (EMBED_WEIGHT, LM_HEAD_WEIGHT) or target in MODULES
        if target in BY_INPUTS:
            if kind == "bias":
                return replace(entry, nbytes=0) if shard.index else entry
            rows, inputs = entry.shape
            part = shard.part(inputs)
            stride = self._strides[entry.name] = entry.nbytes // rows
            shape: tuple[int, ...] = (rows, shard.length(inputs))
            offset = stride // inputs * part.start
        elif by_rows:
            part = shard.part(entry.shape[0])
            shape = (shard.length(entry.shape[0]), *entry.shape[1:])
            offset = entry.nbytes // entry.shape[0] * part.start
        else:
            return entry
        return replace(
            entry,
            shape=shape,
            offset=entry.offset + offset,
            nbytes=entry.nbytes * prod(shape) // prod(entry.shape),
        )


class _Columns(FileIO):
    """Neighbouring columns of a stored matrix, row after row, as if nothing lay between them."""

    def __init__(self, columns: TensorEntry, stride: int) -> None:
        """stride: bytes from row to row."""
        super().__init__(columns.path)
        self._start = columns.offset
        self._stride = stride
        self._width = columns.nbytes // columns.shape[0]
        self._done = 0  # bytes

    def readinto(self, buffer: Any, /) -> int | None:
        row, place = divmod(self._done, self._width)
        self.seek(self._start + row * self._stride + place)
        count = super().readinto(memoryview(buffer)[: self._width - place])
        self._done += count or 0
        return count
