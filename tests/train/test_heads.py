"""Heads start as the identity, and are the published block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorastack.kernels.heads import HeadsGroup, HeadsWeights, PrivateWeights, states_reference
from lorastack.train.heads import Block, MedusaHeads, PrivateBlock, identity_heads, with_private

HIDDEN = 32


def random_heads(num_heads: int, num_layers: int, seed: int = 1, rank: int = 0) -> MedusaHeads:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    def block() -> Block:
        private = PrivateBlock(drawn(rank, HIDDEN), drawn(HIDDEN, rank)) if rank else None
        return Block(drawn(HIDDEN, HIDDEN), drawn(HIDDEN), private)

    return MedusaHeads(tuple(tuple(block() for _ in range(num_layers)) for _ in range(num_heads)))


def test_identity_at_the_start() -> None:
    heads, x_PH = identity_heads(3, 2, HIDDEN), torch.randn(5, HIDDEN)
    assert (heads.num_heads, heads.num_layers, heads.hidden_size) == (3, 2, HIDDEN)
    assert all(torch.equal(heads.state(x_PH, head), x_PH) for head in range(3))


def test_a_head_is_its_published_blocks_in_a_row() -> None:
    heads, x_PH = random_heads(2, 3), torch.randn(5, HIDDEN)
    wanted_PH = x_PH
    for block in heads.heads[1]:
        z_PH = wanted_PH @ block.weight_HH.T + block.bias_H
        wanted_PH = wanted_PH + z_PH * torch.sigmoid(z_PH)
    torch.testing.assert_close(heads.state(x_PH, 1), wanted_PH)


def test_a_private_part_corrects_the_weights() -> None:
    heads, x_PH = random_heads(1, 1, rank=4), torch.randn(5, HIDDEN)
    ((block,),) = heads.heads
    assert block.private is not None and heads.private_rank == 4
    whole_HH = block.weight_HH + block.private.b_HR @ block.private.a_RH
    merged = MedusaHeads(((Block(whole_HH, block.bias_H),),))
    torch.testing.assert_close(heads.state(x_PH, 0), merged.state(x_PH, 0))


def test_a_new_private_part_changes_nothing_and_follows_its_seed() -> None:
    shared, x_PH = random_heads(2, 2), torch.randn(5, HIDDEN)
    one, two, three = (with_private(shared, 4, seed).learnt() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["1.1.linear.lora_A.weight"], three["1.1.linear.lora_A.weight"])
    heads = with_private(shared, 4, 0)
    assert all(torch.equal(heads.state(x_PH, k), shared.state(x_PH, k)) for k in range(2))


def test_a_copy_shares_no_learnt_memory() -> None:
    heads = random_heads(1, 1, rank=2)
    before = {name: tensor.clone() for name, tensor in heads.learnt().items()}
    for tensor in heads.to_host().learnt().values():
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in heads.learnt().items())


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_is_what_is_served(rank: int) -> None:
    heads, x_PH = random_heads(3, 2, rank=rank), torch.randn(5, HIDDEN)

    def stacked(*path: str) -> Tensor:
        """[L, K, ...] of one tensor of every block."""
        found: list[list[Tensor]] = []
        for layer in range(heads.num_layers):
            found.append([])
            for blocks in heads.heads:
                value: object = blocks[layer]
                for name in path:
                    value = getattr(value, name)
                assert isinstance(value, Tensor)
                found[-1].append(value)
        return torch.stack([torch.stack(each) for each in found])

    private = None
    if rank:
        private = PrivateWeights(stacked("private", "a_RH"), stacked("private", "b_HR"))
    weights = HeadsWeights(stacked("weight_HH"), stacked("bias_H"), None, None, private)
    served_XH = states_reference(x_PH, [HeadsGroup(0, 5, weights)])
    ours_PKH = torch.stack([heads.state(x_PH, head) for head in range(3)], 1)
    torch.testing.assert_close(ours_PKH.flatten(0, 1), served_XH)
