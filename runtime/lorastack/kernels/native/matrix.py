"""Weights in the order in which the native kernels read them.

A panel is 16 outputs. In bfloat16 it is [K / 2][16][2], in float32 [K][16]; inputs and outputs are
padded with zeros to multiples of 32. The plain reference of what is done with it is
torch.nn.functional.linear on the weight that was packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorastack.kernels.native.library import Matrix

LANES = 16
PAD = 32  # multiple of inputs and of outputs

Keep = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """panels: [outputs / 16, ...], opaque; bias: float32, one a padded output; inputs: padded."""

    panels: Tensor
    bias: Tensor | None
    inputs: int

    @property
    def struct(self) -> Matrix:
        """Borrows the tensors."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return Matrix(self.panels.data_ptr(), bias, len(self.panels), self.inputs)


def pack_matrix(
    weight_OI: Tensor, bias_O: Tensor | None = None, *, keep: Keep = Tensor.contiguous
) -> PackedMatrix:
    """Outputs in their order. keep: makes the contiguous copy that is returned."""
    outputs, inputs = weight_OI.shape
    padded = _padded(weight_OI, 0, -inputs % PAD, 0, -outputs % PAD)
    bias = None if bias_O is None else _padded(bias_O.float(), 0, -outputs % PAD)
    panels = keep(_panels(padded))
    if weight_OI.dtype == torch.bfloat16:
        panels = panels.unsqueeze(-1).view(torch.bfloat16)
    return PackedMatrix(panels, bias, padded.shape[1])


def pack_pair(
    weight_OI: Tensor, bias_O: Tensor | None = None, *, keep: Keep = Tensor.contiguous
) -> PackedMatrix:
    """Two matrices below each other (gate and up): panels of the first and the second in turn.

    Each half is padded like inputs: what it gives fills every input of the matrix that follows.
    """
    rows = [_padded_rows(half) for half in weight_OI.chunk(2)]
    bias = None
    if bias_O is not None:
        bias = _in_turn([_padded_rows(half.float()) for half in bias_O.chunk(2)])
    packed = pack_matrix(_in_turn(rows), keep=keep)
    return PackedMatrix(packed.panels, bias, packed.inputs)


def matrix_rows(matrix: PackedMatrix, ids_N: Tensor) -> Tensor:
    """Rows of the weight that `pack_matrix` packed, padding included: [N, inputs]."""
    panels, dtype = matrix.panels, matrix.panels.dtype
    if dtype == torch.bfloat16:
        panels = panels.view(torch.int32).squeeze(-1)  # two inputs in one value
    return panels[ids_N // LANES, :, ids_N % LANES].view(dtype)


def _padded_rows(half: Tensor) -> Tensor:
    return _padded(half, *(0, 0) * (half.dim() - 1), 0, -len(half) % PAD)


def _padded(tensor: Tensor, *missing: int) -> Tensor:
    """`pad` copies even where nothing is missing."""
    return pad(tensor, missing) if any(missing) else tensor


def _in_turn(halves: list[Tensor]) -> Tensor:
    panels = [half.view(-1, LANES, *half.shape[1:]) for half in halves]
    return torch.stack(panels, dim=1).flatten(0, 2)


def _panels(weight_OI: Tensor) -> Tensor:
    """A view in the order of panels; of bfloat16 as pairs in one value, which torch moves faster."""
    if weight_OI.dtype == torch.bfloat16:
        weight_OI = weight_OI.view(torch.int32)
    return weight_OI.view(-1, LANES, weight_OI.shape[1]).transpose(1, 2)
