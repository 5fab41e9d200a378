"""Weights as the matmul kernel reads them.

A plain weight stays [O, I], row by row. The codes of a quantised one (see `kernels.quantize`) lie
in tiles of TILE inputs, [I / TILE, O, bytes], so that what a program reads at once lies together:

- int8: code + 128 in a byte, [I / TILE, O, TILE]; scales [O].
- int4: code + 8 in half a byte, [I / TILE, O, TILE / 2]; the low halves are the first TILE / 2
  inputs of the tile, the high halves the others. Scales [I / TILE, O, TILE / GROUP].

Inputs are padded to whole tiles with codes of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorastack.kernels.quantize import GROUP, Kind, Quantise, Quantised, quantise_torch

TILE = 128  # inputs
BIAS = {Kind.INT8: 128, Kind.INT4: 8}  # added to a code, so that none is negative

SPREAD_TOKENS = 64  # buckets of more take a matrix' chunks in turn
BLOCK_OUTPUTS = 64
PROGRAMS = 256  # that keep a device busy
LEAST_CHUNK = 512  # inputs; shorter chunks write more than they save


@dataclass(frozen=True, slots=True)
class MatmulPlan:
    """How a matrix is multiplied, whatever the load.

    chunk: inputs of a partial sum, a multiple of block_inputs; num_chunks: how many there are.
    block_outputs, block_inputs: of a program and of one of its products.
    """

    chunk: int
    num_chunks: int
    block_outputs: int
    block_inputs: int

    @classmethod
    def of(
        cls, num_outputs: int, num_inputs: int, dtype: torch.dtype, kind: Kind | None = None
    ) -> MatmulPlan:
        """Chunks such that few tokens keep a device busy, and no shorter than pays."""
        block_inputs = TILE
        if kind is None and num_inputs % TILE:
            block_inputs = 64
        if kind is None and (dtype == torch.float32 or num_inputs % 16):
            block_inputs = 32  # inputs of float32, and rows that are not aligned, take registers
        wanted = PROGRAMS // -(-num_outputs // BLOCK_OUTPUTS)
        num_chunks = max(1, min(wanted, num_inputs // LEAST_CHUNK))
        return cls.cut(num_inputs, num_chunks, BLOCK_OUTPUTS, block_inputs)

    @classmethod
    def cut(
        cls, num_inputs: int, num_chunks: int, block_outputs: int, block_inputs: int
    ) -> MatmulPlan:
        """num_chunks at most: chunks are whole blocks."""
        blocks = -(-num_inputs // block_inputs)
        chunk = -(-blocks // num_chunks) * block_inputs
        return cls(chunk, -(-num_inputs // chunk), block_outputs, block_inputs)

    def num_parts(self, bucket: int) -> int:
        """Parts that `matmul` writes for a bucket."""
        return self.num_chunks if bucket <= SPREAD_TOKENS else 1


@dataclass(frozen=True, slots=True)
class Weight:
    """values: [O, I] of the model's dtype, or codes, see the module; bias_O: float32.

    scales: bfloat16, of the codes of `kind`.
    """

    values: Tensor
    bias_O: Tensor | None
    num_outputs: int
    num_inputs: int
    plan: MatmulPlan
    kind: Kind | None = None
    scales: Tensor | None = None

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows of the weight, [N, I]: its own where it is plain, else float32 of its codes."""
        if self.kind is None or self.scales is None:
            return self.values[ids_N]
        tiles, scales = self.values[:, ids_N], self.scales
        if self.kind is Kind.INT4:
            tiles = torch.cat((tiles & 15, tiles >> 4), dim=2)
            scale_NI = _by_output(scales[:, ids_N]).repeat_interleave(GROUP, dim=1)
        else:
            scale_NI = scales[ids_N, None]
        codes_NI = _by_output(tiles).float() - BIAS[self.kind]
        return (codes_NI * scale_NI.float())[:, : self.num_inputs]


def pack_weight(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kind: Kind | None = None,
    quantise: Quantise = quantise_torch,
) -> Weight:
    """A plain weight is kept as it is. kind: what `quantise` makes of it; NotFiniteError then."""
    bias_O = None if bias_O is None else bias_O.float()
    outputs, inputs = weight_OI.shape
    plan = MatmulPlan.of(outputs, inputs, weight_OI.dtype, kind)
    if kind is None:
        return Weight(weight_OI.contiguous(), bias_O, outputs, inputs, plan)
    quantised = quantise(weight_OI, kind)
    codes, scales = _tiles(quantised, kind), quantised.scales.flatten()
    if kind is Kind.INT4:
        scales = _by_tile(quantised.scales, TILE // GROUP)
    return Weight(codes, bias_O, outputs, inputs, plan, kind, scales)


def _tiles(quantised: Quantised, kind: Kind) -> Tensor:
    biased = _by_tile(quantised.codes, TILE).to(torch.int16) + BIAS[kind]
    tiles = biased.to(torch.uint8)
    if kind is Kind.INT8:
        return tiles
    low, high = tiles.chunk(2, dim=2)
    return (low | high << 4).contiguous()


def _by_tile(rows_OI: Tensor, size: int) -> Tensor:
    """[I padded / size, O, size]."""
    rows_OI = pad(rows_OI, (0, -rows_OI.shape[1] % size))
    return rows_OI.view(len(rows_OI), -1, size).transpose(0, 1).contiguous()


def _by_output(tiles: Tensor) -> Tensor:
    """[O, I padded]."""
    return tiles.transpose(0, 1).flatten(1)
