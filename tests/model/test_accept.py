"""What backends accept of a step's trees, against sampling every node before any is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.ops import Ops
from lorastack.kernels.sample import Sample
from lorastack.model.backends.accept import accept_trees
from lorastack.model.context import SampledTree
from lorastack.request import SamplingParams, TokenSource
from lorastack.speculation.accept import Accepted
from lorastack.speculation.tree import Tree

VOCAB = 5  # few, so that guesses are often right
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 3]),
    typical_p=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 9),
)


class CountingOps(Ops):
    """Plain ops that note which rows of logits they draw from."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def _sample(self, logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
        self.drawn += [each.row for each in samples]
        return super()._sample(logits_XV, samples)


@st.composite
def rows(draw: st.DrawFn) -> list[SampledTree]:
    """Trees of any shape in random order of nodes, outputs of other rows between them."""
    found, first = [], 0
    for params in draw(st.lists(PARAMS, max_size=4)):
        tokens, parents, taken = [0], [-1], set()
        for _ in range(draw(st.integers(0, 8))):
            parent, token = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, VOCAB - 1))
            if (parent, token) not in taken:
                taken.add((parent, token))
                tokens.append(token)
                parents.append(parent)
        first += draw(st.integers(0, 2))
        sources = (TokenSource.MODEL, *[TokenSource.HEADS] * (len(tokens) - 1))
        tree = Tree(tuple(tokens), tuple(parents), sources)
        found.append(SampledTree(tree, first, params, draw(st.integers(0, 50))))
        first += tree.num_nodes
    return found


def plainly(row: SampledTree, logits_XV: Tensor) -> Accepted:
    """Samples all nodes, then walks down."""
    ops, tree = Ops(), row.tree
    best_X = logits_XV.argmax(-1).tolist()
    samples = []
    for node in range(tree.num_nodes):
        token_index = row.token_index + len(tree.path_to(node))
        samples.append(Sample(row.first_output + node, row.params, token_index))
    sampled = ops.sample(logits_XV, best_X, samples)
    path, tokens = [0], [sampled[0]]
    while True:
        matching = [
            node
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True))
            if parent == path[-1] and token == tokens[-1]
        ]
        if not matching:
            return Accepted(tuple(path[1:]), tuple(tokens))
        path += matching
        tokens.append(sampled[matching[0]])


@given(rows(), st.integers(0, 2**20), st.sampled_from([torch.float32, torch.float64]))
def test_trees_are_accepted_as_if_all_nodes_were_sampled(
    trees: list[SampledTree], seed: int, dtype: torch.dtype
) -> None:
    """But only those on accepted paths are, and none of a greedy row."""
    generator = torch.Generator().manual_seed(seed)
    num_outputs = max((row.first_output + row.tree.num_nodes for row in trees), default=0)
    logits_XV = torch.randn(num_outputs, VOCAB, generator=generator).to(dtype)
    ops = CountingOps()
    found = accept_trees(ops, logits_XV, logits_XV.argmax(-1), trees)
    assert found == [plainly(row, logits_XV) for row in trees]
    on_paths = [
        row.first_output + node
        for row, accepted in zip(trees, found, strict=True)
        for node in (0, *accepted.path)
        if not row.params.greedy
    ]
    assert sorted(ops.drawn) == on_paths
