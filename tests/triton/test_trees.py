"""What a step does for its trees on the device: samples, acceptance, KV moves, heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorastack.kernels.heads import HeadsGroup, HeadsWeights
from lorastack.kernels.ops import Ops
from lorastack.model.backends.accept import accept_trees
from lorastack.model.context import ForwardBatch, HeadsAsk, SampledTree
from lorastack.request import SamplingParams, TokenSource
from lorastack.speculation.tree import Tree
from tests.helpers.mixed_loras import STACKS
from tests.helpers.native import RowPart, lay_out
from tests.helpers.tiny import build_llama
from tests.helpers.triton_world import World, build_world, tokens

PARAMS = [SamplingParams(), SamplingParams(temperature=0.8, top_k=50, seed=3), SamplingParams()]
PAGES = [[1], [3], [5]]
NUM_CANDIDATES = 3


@pytest.fixture(scope="module")
def world(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("trees"), build_llama, {}, device, torch.float32)


def heads_of(world: World, num_heads: int, seed: int) -> HeadsWeights:
    generator = torch.Generator().manual_seed(seed)
    size = world.backend.shapes.hidden_size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(world.backend.device)

    ids_N = torch.arange(7, 47, 2, device=world.backend.device)
    return HeadsWeights(
        0.2 * random(1, num_heads, size, size), random(1, num_heads, size), random(20, size), ids_N
    )


def batch_of(world: World, children: list[list[int]], asks: list[HeadsAsk | None]) -> ForwardBatch:
    """Three rows; every tree is a root with children."""
    parts, trees = [], []
    for row, ids in enumerate(children):
        nodes, parents = [*tokens(1, row), *ids], (-1, *(0 for _ in ids))
        parts.append(RowPart(nodes, 0, PAGES[row], STACKS[row], parents))
        tree = Tree(tuple(nodes), parents, (TokenSource.HEADS,) * len(nodes))
        first = sum(len(each.ids) for each in parts[:-1])
        trees.append(SampledTree(tree, first, PARAMS[row], 4, asks[row]))
    count = sum(len(each.ids) for each in parts)
    return replace(lay_out(world.loras, parts, range(count)), trees=trees)


def test_trees_are_accepted_moved_and_drafted_in_one_call(world: World) -> None:
    backend = world.backend
    first = backend.forward(batch_of(world, [[], [], []], [None] * 3), world.cache())
    right = [each.tokens[0] for each in first.accepted]
    assert first.drafted == ()
    one, two = heads_of(world, 2, 1), heads_of(world, 3, 2)
    asks = [HeadsAsk(one, NUM_CANDIDATES), HeadsAsk(two, NUM_CANDIDATES), HeadsAsk(one, 1)]
    wrong = [token + 1 for token in right]
    # Rows 0 and 1 accept their second child; the third accepts none.
    children = [[wrong[0], right[0]], [wrong[1], right[1]], [wrong[2]]]
    batch, kv = batch_of(world, children, asks), world.cache()
    outputs = backend.forward(batch, kv)

    assert [each.path for each in outputs.accepted] == [(2,), (2,), ()]
    assert [each.tokens[0] for each in outputs.accepted] == right
    assert outputs.accepted == accept_trees(Ops(), outputs.logits_XV, outputs.best_X, batch.trees)

    ends = [tree.first_output + (accepted.path or (0,))[-1] for tree, accepted in
            zip(batch.trees, outputs.accepted, strict=True)]  # fmt: skip
    for ask, end, top in zip(asks, ends, outputs.drafted, strict=True):
        hidden_BH = outputs.hidden_XH[end : end + 1].contiguous()
        expected = Ops().propose(hidden_BH, [HeadsGroup(0, 1, ask.heads)], NUM_CANDIDATES)
        assert top is not None and torch.equal(top.ids_XR, expected.ids_XR.cpu())
        torch.testing.assert_close(top.logprobs_XR, expected.logprobs_XR.cpu(), atol=1e-4, rtol=0)

    assert outputs.moved
    # A step that failed behind its moves runs again, on what they left.
    assert backend.forward(batch, kv).accepted == outputs.accepted
    chains, plain = batch_of(world, [[right[0]], [right[1]], []], [None] * 3), world.cache()
    backend.forward(chains, plain)
    for page in (PAGES[0], PAGES[1]):
        assert torch.equal(kv.data[:, page, :, :, :2], plain.data[:, page, :, :, :2])


def test_heads_beyond_the_room_are_left_to_the_engine(world: World) -> None:
    """Of a bucket of four tokens: 32 (tree, head) pairs."""
    many, few = heads_of(world, 30, 1), heads_of(world, 2, 2)
    asks = [HeadsAsk(many, 2), HeadsAsk(few, 2), HeadsAsk(few, 2)]
    outputs = world.backend.forward(batch_of(world, [[], [], []], asks), world.cache())
    assert [top is not None for top in outputs.drafted] == [True, True, False]
    assert outputs.drafted[0] is not None and outputs.drafted[0].ids_XR.shape == (30, 2)
