"""A shard's view of a checkpoint: its tensors are the shard's parts, and no more is read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from lorastack.model.backends.parallel.shards import BY_INPUTS, Shard
from lorastack.model.checkpoint import DTYPES, PIECE, Checkpoint
from lorastack.model.weights import EMBED_WEIGHT, LM_HEAD_WEIGHT, MODULES
from lorastack.tensorheader import ITEMSIZES, TensorEntry


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
        if name in self._strides:
            self.check(name, tuple(out.shape))
            self._read_columns(name, out)
        elif not self.tensors[name].nbytes:
            out.zero_()
        else:
            super().read_into(name, out)

    def read_rows(self, name: str, ids: Sequence[int], out_NI: Tensor) -> None:
        """Rows of the whole tensor, whatever the shard, into a tensor on the CPU. Any thread."""
        entry = self._whole.tensors[name]
        row_I = torch.empty(entry.shape[1], dtype=DTYPES[entry.dtype])
        reader = copy(self)  # which reports no progress
        reader._progress = None
        with entry.path.open("rb", buffering=0) as stream:
            for place, row in enumerate(ids):
                stream.seek(entry.offset + row * row_I.nbytes)
                reader._fill(stream, row_I, name)
                out_NI[place] = row_I

    def _cut(self, entry: TensorEntry, shard: Shard) -> TensorEntry:
        """The entry of the shard's part."""
        size = ITEMSIZES.get(entry.dtype, 0)
        target, _, kind = entry.name.rpartition(".")
        target = target.rpartition(".")[2]
        if entry.name in (EMBED_WEIGHT, LM_HEAD_WEIGHT) or (
            target in MODULES and target not in BY_INPUTS
        ):
            part = shard.part(entry.shape[0])
            row = entry.nbytes // entry.shape[0]
            shape = (part.stop - part.start, *entry.shape[1:])
            offset = entry.offset + part.start * row
            return replace(entry, shape=shape, offset=offset, nbytes=shape[0] * row)
        if target in BY_INPUTS and kind == "weight":
            rows, inputs = entry.shape
            part = shard.part(inputs)
            self._strides[entry.name] = inputs * size
            width = part.stop - part.start
            offset = entry.offset + part.start * size
            return replace(entry, shape=(rows, width), offset=offset, nbytes=rows * width * size)
        if target in BY_INPUTS and shard.index:
            return replace(entry, nbytes=0)
        return entry

    def _read_columns(self, name: str, out_OI: Tensor) -> None:
        """Row by row into a piece on the CPU, and from there to its place."""
        entry, stride = self.tensors[name], self._strides[name]
        width = entry.shape[1]
        rows = max(1, PIECE // stride)
        piece_NI = torch.empty(rows, width, dtype=DTYPES[entry.dtype])
        with entry.path.open("rb", buffering=0) as stream:
            for first in range(0, len(out_OI), rows):
                part_NI = piece_NI[: len(out_OI) - first]
                for row, row_I in enumerate(part_NI, first):
                    stream.seek(entry.offset + row * stride)
                    self._fill(stream, row_I, name)
                out_OI[first : first + rows] = part_NI
