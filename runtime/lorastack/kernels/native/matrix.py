"""Weights in the order in which the native kernels read them.

A panel is 16 outputs of K inputs. In bfloat16 it is [K / 2][16][2], in float32 [K][16]; inputs and
outputs are padded with zeros to multiples of 32. The codes of quantised weights are int8 [K][16],
for int4 int32 [K / 8][16] with eight inputs in one. The plain reference of a product is
torch.nn.functional.linear on the weight that was packed, dequantised where it was quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorastack.kernels.native.library import Matrix
from lorastack.kernels.quantize import STORED, Kind, Quantise, pack_nibbles, quantise_torch

LANES = 16
PAD = 32  # inputs and outputs are padded to a multiple of it

Keep = Callable[[Tensor], Tensor]
_Order = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """panels: [outputs / 16, ...], opaque; bias: float32, one a padded output; inputs: padded.

    kind: what the weight is quantised to; scales: bfloat16 [outputs / 16, groups, 16] of its codes.
    """

    panels: Tensor
    bias: Tensor | None
    inputs: int
    kind: Kind | None = None
    scales: Tensor | None = None

    @property
    def struct(self) -> Matrix:
        """The matrix for the library; it borrows the tensors."""
        bias = None if self.bias is None else self.bias.data_ptr()
        scales = None if self.scales is None else self.scales.data_ptr()
        panels, stored = len(self.panels), STORED[self.kind]
        return Matrix(self.panels.data_ptr(), bias, scales, panels, self.inputs, stored)


def pack_matrix(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kind: Kind | None = None,
    quantise: Quantise = quantise_torch,
    keep: Keep = Tensor.contiguous,
) -> PackedMatrix:
    """Pack a weight with its outputs in order. keep: makes the contiguous copies that are returned.

    kind: quantise to it, which raises NotFiniteError for a weight that is not finite.
    """
    return _pack(weight_OI, bias_O, _padded_rows, kind, quantise, keep)


def pack_pair(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kind: Kind | None = None,
    quantise: Quantise = quantise_torch,
    keep: Keep = Tensor.contiguous,
) -> PackedMatrix:
    """Pack two matrices of equal size, one below the other (gate and up): their panels alternate.

    Each half is padded by itself, like the inputs of the matrix that reads its outputs. kind and
    keep: as in `pack_matrix`.
    """
    return _pack(weight_OI, bias_O, _in_turn, kind, quantise, keep)


def matrix_rows(matrix: PackedMatrix, ids_N: Tensor) -> Tensor:
    """Rows of the weight that `pack_matrix` packed, padding included: [N, inputs].

    Rows of an int8 weight are dequantised, in float32. int4 is not supported.
    """
    assert matrix.kind is not Kind.INT4, "nobody reads rows of int4"
    panels, panel_N, lane_N = matrix.panels, ids_N // LANES, ids_N % LANES
    if panels.dtype == torch.bfloat16:
        pairs = panels.view(torch.int32).squeeze(-1)
        return pairs[panel_N, :, lane_N].view(torch.bfloat16)
    rows = panels[panel_N, :, lane_N]
    if matrix.scales is None:
        return rows
    return rows * matrix.scales[panel_N, :, lane_N].float()


def _pack(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    order: _Order,
    kind: Kind | None,
    quantise: Quantise,
    keep: Keep,
) -> PackedMatrix:
    bias = None if bias_O is None else order(bias_O.float())
    if kind is None:
        padded = _padded(weight_OI, 0, -weight_OI.shape[1] % PAD)
        return PackedMatrix(_panels(order(padded), keep), bias, padded.shape[1])
    quantised = quantise(weight_OI, kind)
    codes = order(quantised.codes)
    inputs = codes.shape[1]
    if kind is Kind.INT4:  # eight inputs of an output in one value
        codes = pack_nibbles(codes).view(torch.int32)
    scales = keep(_transposed(order(quantised.scales)))
    return PackedMatrix(_panels(codes, keep), bias, inputs, kind, scales)


def _panels(rows_OI: Tensor, keep: Keep) -> Tensor:
    if rows_OI.dtype != torch.bfloat16:
        return keep(_transposed(rows_OI))
    # Pairs of inputs are one value, which torch also moves faster.
    return keep(_transposed(rows_OI.view(torch.int32))).unsqueeze(-1).view(torch.bfloat16)


def _by_panel(rows: Tensor) -> Tensor:
    return rows.view(-1, LANES, *rows.shape[1:])


def _transposed(rows_OI: Tensor) -> Tensor:
    """A view [outputs / 16, in, 16]."""
    return _by_panel(rows_OI).transpose(1, 2)


def _padded_rows(rows: Tensor) -> Tensor:
    return _padded(rows, *(0, 0) * (rows.dim() - 1), 0, -len(rows) % PAD)


def _padded(tensor: Tensor, *missing: int) -> Tensor:
    """`pad`, but no copy where nothing is missing."""
    return pad(tensor, missing) if any(missing) else tensor


def _in_turn(rows: Tensor) -> Tensor:
    panels = [_by_panel(_padded_rows(half)) for half in rows.chunk(2)]
    return torch.stack(panels, dim=1).flatten(0, 2)
