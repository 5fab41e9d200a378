"""A dense layer whose weight is laid out once for the small batches of decoding.

Contract. `linear(x_TI, dense)` is x @ W.T + b, [T, out], a new contiguous tensor of x's dtype.

On a CPU that oneDNN serves, W is reordered when it is packed: on 4 to 32 rows that is about twice
as fast as a plain matmul, and in float32 a row's result hardly ever depends on the number of rows
beside it (a plain one's does). Elsewhere W stays as it is. The plain reference is
torch.nn.functional.linear.

A quantised weight stays codes and is made whole for each call, which is slow and takes memory for a
moment: it is the reference of the native kernels, and serves where they do not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lorastack.kernels.quantize import (
    Kind,
    Quantise,
    Quantised,
    dequantise,
    pack_nibbles,
    quantise_torch,
    unpack_nibbles,
)

# The number of rows oneDNN lays a weight out for; from 8 upwards it picks one layout for all.
PACK_ROWS = 64
GRAIN = 1 << 15  # elements: torch copies more than these at once with its OpenMP threads
DEVICE_GRAIN = 1 << 22  # elements that are copied at once on another device: little memory beside


@dataclass(frozen=True, slots=True)
class Dense:
    """A packed weight. weight: [out, in], opaque when `reordered`; bias: [out].

    scales: only of a quantised weight. Its `weight` holds codes, in int4 two in a byte, and its
    `inputs` are those without padding.
    """

    weight: Tensor
    bias: Tensor | None
    reordered: bool
    scales: Tensor | None = None
    inputs: int = 0


def pack_dense(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kind: Kind | None = None,
    quantise: Quantise = quantise_torch,
) -> Dense:
    """Lay a weight out for its device; the plain weight is not kept.

    kind: what `quantise` makes of it. Raises NotFiniteError then.
    """
    if kind is not None:
        quantised = quantise(weight_OI, kind)
        codes = pack_nibbles(quantised.codes) if kind is Kind.INT4 else quantised.codes
        return Dense(codes, bias_O, False, quantised.scales, quantised.inputs)
    if not _reorders(weight_OI):
        return Dense(weight_OI, bias_O, reordered=False)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS)
    return Dense(packed, bias_O, reordered=True)


def linear(x_TI: Tensor, dense: Dense) -> Tensor:
    """x @ W.T + b."""
    if dense.scales is not None:
        return functional.linear(x_TI, plain_weight(dense).to(x_TI.dtype), dense.bias)
    if not dense.reordered:
        return functional.linear(x_TI, dense.weight, dense.bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, dense.weight, dense.bias, "none", [], "")
    return out


def linear_wide(x_TI: Tensor, dense: Dense) -> Tensor:
    """The same in float32, or in float64 of a float64 x.

    On CUDA sums of 16-bit products come out as they are. Elsewhere they are rounded to x's dtype
    first: torch has no such product there, and float32 weights for each call would be the price.
    """
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    if x_TI.device.type == "cpu" or x_TI.dtype == wide or dense.scales is not None:
        return linear(x_TI, dense).to(wide)
    out = torch.mm(x_TI, dense.weight.t(), out_dtype=wide)
    return out if dense.bias is None else out.add_(dense.bias)


def plain_weight(dense: Dense) -> Tensor:
    """The weight that was packed, [out, in], or what the codes of a quantised one stand for.

    A reordered or quantised weight is copied whole for a moment.
    """
    if dense.scales is not None:
        codes = dense.weight
        if codes.dtype == torch.uint8:
            codes = unpack_nibbles(codes)
        return dequantise(Quantised(codes, dense.scales, dense.inputs))
    return dense.weight.to_dense() if dense.reordered else dense.weight


def copy_rows(read: Callable[[Tensor], Tensor], ids_N: Tensor, out_NI: Tensor) -> None:
    """out_NI = read(ids_N), piece by piece; `read` gets ids where `out_NI` is.

    On a CPU in pieces that torch does not hand to its OpenMP threads. On CUDA all of it runs in the
    caller's stream.
    """
    grain = GRAIN if out_NI.device.type == "cpu" else DEVICE_GRAIN
    step = max(1, grain // out_NI.shape[1])
    ids_N = ids_N.to(out_NI.device)
    for start in range(0, len(ids_N), step):
        piece = slice(start, start + step)
        out_NI[piece] = read(ids_N[piece])


def _reorders(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32
