"""A dense layer whose weight is laid out once for the small batches of decoding.

Contract. `linear(x_TI, dense)` is x @ W.T + b, [T, out], a new contiguous tensor of x's dtype.

On a CPU that oneDNN serves, W is reordered when it is packed: on 4 to 32 rows that is about twice
as fast as a plain matmul, and in float32 a row's result hardly ever depends on the number of rows
beside it (a plain one's does). Elsewhere W stays as it is. The plain reference is
torch.nn.functional.linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# The number of rows oneDNN lays a weight out for; from 8 upwards it picks one layout for all.
PACK_ROWS = 64
GRAIN = 1 << 15  # elements: torch copies more than these at once with its OpenMP threads


@dataclass(frozen=True, slots=True)
class Dense:
    """A packed weight. weight: [out, in], opaque when `reordered`; bias: [out]."""

    weight: Tensor
    bias: Tensor | None
    reordered: bool


def pack_dense(weight_OI: Tensor, bias_O: Tensor | None = None) -> Dense:
    """Lay a weight out for its device; the plain weight is not kept."""
    if not _reorders(weight_OI):
        return Dense(weight_OI, bias_O, reordered=False)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS)
    return Dense(packed, bias_O, reordered=True)


def linear(x_TI: Tensor, dense: Dense) -> Tensor:
    """x @ W.T + b."""
    if not dense.reordered:
        return functional.linear(x_TI, dense.weight, dense.bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, dense.weight, dense.bias, "none", [], "")
    return out


def plain_weight(dense: Dense) -> Tensor:
    """The weight that was packed, [out, in]; for a moment a copy of all of it if reordered."""
    return dense.weight.to_dense() if dense.reordered else dense.weight


def copy_rows(read: Callable[[Tensor], Tensor], ids_N: Tensor, out_NI: Tensor) -> None:
    """out_NI = read(ids_N), in pieces that torch does not hand to its OpenMP threads."""
    step = max(1, GRAIN // out_NI.shape[1])
    for start in range(0, len(ids_N), step):
        piece = slice(start, start + step)
        out_NI[piece] = read(ids_N[piece])


def _reorders(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32
