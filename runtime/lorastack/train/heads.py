"""Medusa heads as they are trained and measured, on any device, with autograd.

    r = x, then for each of L blocks: r + SiLU(W r + b)         logits = output r

The output is the base's lm_head, or the rows of a draft vocabulary, for all heads; version 1 heads
bring one each. A private part of rank R corrects frozen shared heads: SiLU(W r + b + B (A r)).
Tensors are named as in the published files. Source: Medusa (FasterDecoding/Medusa); how heads are
served is `lorastack.kernels.heads`.

Shape suffixes: P positions, K heads, L blocks a head, H hidden, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


@dataclass(frozen=True, slots=True)
class PrivateBlock:
    """The low-rank correction of a shared block."""

    a_RH: Tensor
    b_HR: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """One residual block. The private part, if there is one, is all of it that learns."""

    weight_HH: Tensor
    bias_H: Tensor
    private: PrivateBlock | None = None

    def __call__(self, r_PH: Tensor) -> Tensor:
        """[P, H], computed in the dtype of r."""
        dtype = r_PH.dtype
        z_PH = linear(r_PH, self.weight_HH.to(dtype), self.bias_H.to(dtype))
        if self.private is not None:
            shrunk_PR = linear(r_PH, self.private.a_RH.to(dtype))
            z_PH = z_PH + linear(shrunk_PR, self.private.b_HR.to(dtype))
        return r_PH + silu(z_PH)


@dataclass(frozen=True, slots=True)
class MedusaHeads:
    """K heads of L blocks each. outputs: [V, H] a head in version 1, () in version 2."""

    heads: tuple[tuple[Block, ...], ...]
    outputs: tuple[Tensor, ...] = ()

    @property
    def num_heads(self) -> int:
        return len(self.heads)

    @property
    def num_layers(self) -> int:
        return len(self.heads[0])

    @property
    def hidden_size(self) -> int:
        return self.heads[0][0].bias_H.shape[0]

    @property
    def private_rank(self) -> int:
        """0 without a private part."""
        private = self.heads[0][0].private
        return 0 if private is None else private.a_RH.shape[0]

    def state(self, x_PH: Tensor, head: int) -> Tensor:
        """r of one head (0-based), [P, H], in the dtype of x."""
        for block in self.heads[head]:
            x_PH = block(x_PH)
        return x_PH

    def learnt(self) -> dict[str, Tensor]:
        """The tensors that training changes, by their names in the folder: the heads themselves,
        or the private part alone."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for head, blocks in enumerate(self.heads):
            for layer, block in enumerate(blocks):
                name = f"{head}.{layer}.linear"
                if block.private is None:
                    yield f"{name}.weight", block.weight_HH
                    yield f"{name}.bias", block.bias_H
                else:
                    yield f"{name}.lora_A.weight", block.private.a_RH
                    yield f"{name}.lora_B.weight", block.private.b_HR

    def to_host(self) -> MedusaHeads:
        """A copy in float32 in the host's memory."""
        return self.to(torch.device("cpu"), torch.float32)

    def to(self, device: torch.device, dtype: torch.dtype) -> MedusaHeads:
        """A copy that shares no learnt tensor with this one. Outputs keep their dtype."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        def block(old: Block) -> Block:
            private = None
            if old.private is not None:
                private = PrivateBlock(moved(old.private.a_RH), moved(old.private.b_HR))
            return Block(moved(old.weight_HH), moved(old.bias_H), private)

        heads = tuple(tuple(map(block, blocks)) for blocks in self.heads)
        return MedusaHeads(heads, tuple(out.to(device) for out in self.outputs))


def identity_heads(num_heads: int, num_layers: int, hidden_size: int) -> MedusaHeads:
    """Zero weights and biases in float32: every head guesses what the base says next."""

    def block() -> Block:
        return Block(torch.zeros(hidden_size, hidden_size), torch.zeros(hidden_size))

    return MedusaHeads(tuple(tuple(block() for _ in range(num_layers)) for _ in range(num_heads)))


def with_private(shared: MedusaHeads, rank: int, seed: int) -> MedusaHeads:
    """The shared heads with a private part that changes nothing yet: A is drawn, B is zero.

    A's values have the variance 1 / H, so that A r is about as large as r's own values.
    """
    generator = torch.Generator().manual_seed(seed)
    size = shared.hidden_size

    def block(old: Block) -> Block:
        a_RH = torch.randn(rank, size, generator=generator) * size**-0.5
        return Block(old.weight_HH, old.bias_H, PrivateBlock(a_RH, torch.zeros(size, rank)))

    heads = tuple(tuple(map(block, blocks)) for blocks in shared.heads)
    return MedusaHeads(heads, shared.outputs)
