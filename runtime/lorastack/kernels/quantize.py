"""Weights as small integers with scales, and the weight that they stand for.

Contract. A weight [out, in] and a kind give codes and scales; the weight they stand for is
code * scale, exactly, on every backend.

- int8: codes -127..127, one scale an output, its largest magnitude / 127. Codes are exact in
  bfloat16, so a product in bfloat16 multiplies by codes and its sums by the scale.
- int4: codes -8..7, one scale for each GROUP inputs of an output. The value of the largest
  magnitude lies near code -8, so the scale takes its sign; of a few scales the one with the least
  squared error is kept: clipping the largest value a little often helps the others more. Scales
  have 5 significant bits, so that code * scale has at most 8 and is exact in bfloat16. Squares are
  summed as neighbours, then neighbouring sums, and so on, every operation rounded by itself.

Scales are bfloat16, which takes half a bit a weight in int4 and next to nothing in int8. The plain
references are `dequantise` and `quantise_reference`; the native library quantises bfloat16 several
times faster, to the bits that `quantise_reference` gives on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorastack.kernels.native.isa import Isa
from lorastack.kernels.native.library import library

GROUP = 32  # inputs that share a scale in int4; inputs are padded to it with zeros
_LARGEST = 127  # code of int8
_EXTREMES = (8.8, 8.2, 7.6, 7.0)  # candidates: minus the code, unrounded, of a group's extreme
_TINY = 2.0**-100  # scales below are 0: no product with a code is subnormal
_CHUNK = 1 << 20  # weights that are quantised at once, so that temporaries stay in the caches


class Kind(StrEnum):
    """How a weight is stored."""

    INT8 = "int8"
    INT4 = "int4"


STORED = {None: 0, Kind.INT8: 1, Kind.INT4: 2}  # LORASTACK_PLAIN and so on, in abi.h


def head_kind(kind: Kind | None) -> Kind | None:
    """How lm_head is stored: in 8 bits even beside int4, as no later layer evens its errors out."""
    return None if kind is None else Kind.INT8


class NotFiniteError(ValueError):
    """A weight holds NaN or infinity. row: the first output that does."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite")
        self.row = row


@dataclass(frozen=True, slots=True)
class Quantised:
    """codes: int8 [out, in padded to GROUP]; scales: bfloat16 [out, 1 or in / GROUP].

    inputs: without padding.
    """

    codes: Tensor
    scales: Tensor
    inputs: int


Quantise = Callable[[Tensor, Kind], Quantised]


def quantise_torch(weight_OI: Tensor, kind: Kind) -> Quantised:
    """Codes and scales of a weight of any float dtype. Raises NotFiniteError."""
    return _checked(quantise_reference(weight_OI, kind))


def quantise_native(isa: Isa, weight_OI: Tensor, kind: Kind) -> Quantised:
    """`quantise_torch` of a bfloat16 weight on a CPU that has `isa`, which computes in float32."""
    native, weight_OI, quantised = library(), weight_OI.contiguous(), _empty(weight_OI, kind)
    assert native is not None
    native.lorastack_quantise(
        *(isa, weight_OI.data_ptr(), *weight_OI.shape, STORED[kind]),
        *(quantised.codes.data_ptr(), quantised.scales.data_ptr(), torch.get_num_threads()),
    )
    return _checked(quantised)


def _checked(quantised: Quantised) -> Quantised:
    finite_O = quantised.scales.isfinite().all(dim=1)
    if not finite_O.all():
        raise NotFiniteError(int(finite_O.int().argmin()))
    return quantised


def quantise_reference(weight_OI: Tensor, kind: Kind) -> Quantised:
    """The contract in plain torch; a scale is not finite where a weight is not."""
    quantised = _empty(weight_OI, kind)
    (outputs, width), groups = quantised.codes.shape, quantised.scales.shape[1]
    rows = max(1, _CHUNK // width)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        values = pad(weight_OI[part].float(), (0, width - quantised.inputs))
        codes, quantised.scales[part] = _quantised(values.view(-1, groups, width // groups), kind)
        quantised.codes[part] = codes.flatten(1)
    return quantised


def _empty(weight_OI: Tensor, kind: Kind) -> Quantised:
    """Uninitialised codes and scales for a weight of this shape."""
    outputs, inputs = weight_OI.shape
    width = inputs + -inputs % GROUP
    codes = weight_OI.new_empty((outputs, width), dtype=torch.int8)
    groups = 1 if kind is Kind.INT8 else width // GROUP
    return Quantised(codes, weight_OI.new_empty((outputs, groups), dtype=torch.bfloat16), inputs)


def dequantise(weight: Quantised) -> Tensor:
    """The weight that the codes stand for, float32 [out, in]."""
    outputs, groups = weight.scales.shape
    grouped = weight.codes.view(outputs, groups, -1).float()
    return grouped.mul_(weight.scales[:, :, None].float()).flatten(1)[:, : weight.inputs]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes -8..7 in a byte, the even one below. [..., 2 n] -> uint8 [..., n]."""
    even, odd = codes.view(*codes.shape[:-1], -1, 2).unbind(-1)
    return (even & 15 | odd << 4).view(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The codes that `pack_nibbles` packed: int8 [..., 2 n]."""
    both = packed.view(torch.int8)
    return torch.stack((both << 4 >> 4, both >> 4), dim=-1).flatten(-2)


def _quantised(values_OGI: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes as floats and bfloat16 scales [out, groups]; a scale is not finite where a value is."""
    largest_OG = values_OGI.abs().amax(dim=2)
    if kind is Kind.INT8:
        scale_OG = _rounded_up(largest_OG / _LARGEST)
        return _in_steps(values_OGI, scale_OG).round_(), scale_OG
    negative_OG = values_OGI.amin(dim=2) == -largest_OG
    extreme_OG = torch.where(negative_OG, -largest_OG, largest_OG)
    best_OG = torch.full_like(largest_OG, torch.inf)
    scale_OG = largest_OG.to(torch.bfloat16)  # of zeros; what is not finite finds no better one
    for code in _EXTREMES:
        tried_OG = _without_tiny(_short(extreme_OG / -code))
        exact_OGI = _in_steps(values_OGI, tried_OG)
        off_OGI = exact_OGI.round().clamp_(-8, 7).sub_(exact_OGI)
        step_OG = tried_OG / largest_OG  # so that no square overflows or vanishes
        error_OG = _sum(off_OGI.square_()) * step_OG.square()
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        scale_OG = torch.where(better_OG, tried_OG, scale_OG)
    return _in_steps(values_OGI, scale_OG).round_().clamp_(-8, 7), scale_OG


def _sum(values_OGI: Tensor) -> Tensor:
    """The sum over each group, [O, G], in the order of the contract."""
    while values_OGI.shape[2] > 1:
        values_OGI = values_OGI[:, :, ::2] + values_OGI[:, :, 1::2]
    return values_OGI[:, :, 0]


def _in_steps(values_OGI: Tensor, scale_OG: Tensor) -> Tensor:
    inverse_OG = torch.where(scale_OG == 0, 0.0, 1 / scale_OG.float())
    return values_OGI * inverse_OG[:, :, None]


def _rounded_up(scale_OG: Tensor) -> Tensor:
    """The nearest bfloat16 that is not below, so that no code exceeds the largest."""
    nearest = scale_OG.to(torch.bfloat16)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return _without_tiny(torch.where(nearest.float() < scale_OG, above, nearest))


def _short(scale_OG: Tensor) -> Tensor:
    """The nearest bfloat16 of 5 significant bits."""
    mantissa, exponent = torch.frexp(scale_OG)
    return torch.ldexp((mantissa * 32).round_() / 32, exponent).to(torch.bfloat16)


def _without_tiny(scale_OG: Tensor) -> Tensor:
    return torch.where(scale_OG.abs() < _TINY, torch.zeros_like(scale_OG), scale_OG)
