"""Acceptance and KV moves on the device, against the pure rule and `KVCache.move`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.triton.accept import Accepted, Slots, Trees, accept, move_kv
from lorastack.layout import ModelShapes
from lorastack.model.kv import KVCache, Move
from lorastack.request import TokenSource
from lorastack.speculation.accept import accept as accept_reference
from lorastack.speculation.tree import Tree
from tests.helpers.examples import at_most

VOCAB, MAX_NODES, PAGE_SIZE = 3, 16, 4  # few tokens, so that guesses are often right
UNSEEN = -7  # what is not written


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Of any shape in any order of nodes."""
    tokens, parents, taken = [0], [-1], set()
    for _ in range(draw(st.integers(0, MAX_NODES - 1))):
        parent, token = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, VOCAB - 1))
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    return Tree(tuple(tokens), tuple(parents), (TokenSource.MODEL,) * len(tokens))


def room(num_trees: int, num_outputs: int, device: torch.device) -> Accepted:
    sizes = (num_trees, num_trees, num_outputs)
    return Accepted(
        *(torch.full((size,), UNSEEN, dtype=torch.int32, device=device) for size in sizes)
    )


class Step:
    """Trees and what is sampled at their nodes, outputs of other rows before each."""

    def __init__(self, rows: list[Tree], seed: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.firsts, tokens, parents = [], [UNSEEN] * 2, [UNSEEN] * 2
        for tree in rows:
            self.firsts.append(len(tokens))
            tokens += [*tree.tokens, UNSEEN]
            parents += [*tree.parents, UNSEEN]
        generator = torch.Generator().manual_seed(seed)
        self.sampled = torch.randint(VOCAB, (len(tokens) + MAX_NODES,), generator=generator).int()
        self.trees = Trees(
            self.ints([*self.firsts, UNSEEN]),
            self.ints([*(tree.num_nodes for tree in rows), UNSEEN]),
            self.ints(tokens + [UNSEEN] * MAX_NODES),
            self.ints(parents + [0] * MAX_NODES),
            self.ints([len(rows)]),
        )

    def ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def accept(self) -> Accepted:
        """One tree more has room."""
        bucket = len(self._rows) + 1
        out = room(bucket, len(self.sampled), self._device)
        accept(self.sampled.to(self._device), self.trees, out, bucket, MAX_NODES)
        return out

    def expected(self) -> list[tuple[int, ...]]:
        """Paths."""
        found = accept_reference(
            self._rows,
            lambda nodes: [int(self.sampled[self.firsts[row] + node]) for row, node, _ in nodes],
        )
        return [each.path for each in found]


@at_most(25)
@given(st.lists(trees(), max_size=4), st.integers(0, 2**20))
def test_paths_are_the_pure_rules(device: torch.device, rows: list[Tree], seed: int) -> None:
    step = Step(rows, seed, device)
    out = step.accept()
    expected = step.expected()
    path_X = [UNSEEN] * len(step.sampled)
    for first, path in zip(step.firsts, expected, strict=True):
        path_X[first : first + len(path)] = path
    ends = [first + (path or (0,))[-1] for first, path in zip(step.firsts, expected, strict=True)]
    assert out.lengths_B.tolist() == [*map(len, expected), UNSEEN]
    assert out.ends_B.tolist() == [*ends, UNSEEN]
    assert out.path_X.tolist() == path_X


@at_most(15)
@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 2**20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_are_the_caches(
    device: torch.device, dtype: torch.dtype, rows: list[Tree], seed: int
) -> None:
    """Pages in any order, and sizes that are no powers of two; nothing else is touched."""
    step = Step(rows, seed, device)
    pages_each = 8
    shapes = ModelShapes(
        architecture="",
        hidden_size=18,
        intermediate_size=1,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        head_dim=6,
        vocab_size=VOCAB,
        max_context=32,
        tie_word_embeddings=False,
    )
    kv = KVCache(shapes, pages_each * len(rows), PAGE_SIZE, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    kv.data.copy_(torch.randn(kv.data.shape, generator=generator))
    tables = torch.randperm(pages_each * len(rows), generator=generator).view(-1, pages_each)
    committed = torch.randint(12, (len(rows),), generator=generator).tolist()
    before = kv.data.clone()
    accepted = step.accept()
    slots = Slots(
        step.ints(tables.flatten().tolist()),
        step.ints([row * pages_each for row in range(len(rows))] + [UNSEEN]),
        step.ints([*committed, UNSEEN]),
    )
    move_kv(kv.data, accepted, slots, step.trees, len(rows) + 1)
    moved = kv.data.clone()
    kv.data.copy_(before)
    kv.move(
        [
            Move(table, [start + node for node in path], [start + 1 + i for i in range(len(path))])
            for table, start, path in zip(tables.tolist(), committed, step.expected(), strict=True)
        ]
    )
    assert torch.equal(moved, kv.data)
