from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.request import TokenSource, TypicalAcceptance
from lorastack.speculation.accept import Accepted, accept, accept_typical
from lorastack.speculation.tree import Tree

NUM_TOKENS = 4
Path = tuple[int, ...]


def make_tree(parents: Sequence[int], tokens: Sequence[int]) -> Tree:
    sources = (TokenSource.MODEL,) + (TokenSource.HEADS,) * (len(parents) - 1)
    return Tree(tuple(tokens), tuple(parents), sources)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Siblings carry distinct tokens; nodes are in any order."""
    parents, tokens = [-1], [draw(st.integers(0, NUM_TOKENS - 1))]
    taken = set()
    for _ in range(draw(st.integers(0, 9))):
        parent = draw(st.integers(0, len(parents) - 1))
        token = draw(st.integers(0, NUM_TOKENS - 1))
        if (parent, token) not in taken:
            taken.add((parent, token))
            parents.append(parent)
            tokens.append(token)
    return make_tree(parents, tokens)


drafted_rows = st.lists(trees(), max_size=5)


def next_token(context: Path) -> int:
    """A model whose draw depends on everything before."""
    return hash(context) % NUM_TOKENS


def generate(context: Path, length: int) -> Path:
    for _ in range(length):
        context = (*context, next_token(context))
    return context


def nodes_to(row: Tree, node: int) -> Path:
    """The nodes from the root to `node`, both included."""
    nodes = [node]
    while (node := row.parents[node]) >= 0:
        nodes.append(node)
    return tuple(nodes[::-1])


def context_at(row: Tree, node: int) -> Path:
    return tuple(row.tokens[at] for at in nodes_to(row, node))


@given(drafted_rows)
def test_tokens_are_those_of_plain_generation_and_only_the_path_is_drawn(
    rows: list[Tree],
) -> None:
    drawn: list[tuple[int, int, int]] = []

    def draw(level: Sequence[tuple[int, int, int]]) -> list[int]:
        drawn.extend(level)
        return [next_token(context_at(rows[row], node)) for row, node, _ in level]

    for row, (drafted, accepted) in enumerate(zip(rows, accept(rows, draw), strict=True)):
        plain = generate(drafted.tokens[:1], len(accepted.tokens))
        assert accepted.tokens == plain[1:]
        assert len(accepted.tokens) == len(accepted.path) + 1
        assert tuple(drafted.tokens[node] for node in accepted.path) == accepted.tokens[:-1]
        last = accepted.path[-1] if accepted.path else 0
        assert accepted.tokens[-1] not in {drafted.tokens[c] for c in drafted.children[last]}
        path = (0, *accepted.path)
        assert [at for at in drawn if at[0] == row] == [
            (row, node, depth) for depth, node in enumerate(path)
        ]


def test_rows_leave_one_by_one() -> None:
    rows = [make_tree((-1, 0, 0, 1, 1, 2), (0, 1, 2, 3, 4, 5)), Tree.root(0)]
    calls: list[list[tuple[int, int, int]]] = []

    def draw(level: Sequence[tuple[int, int, int]]) -> list[int]:
        calls.append(list(level))
        return [2 for _ in level]

    assert accept(rows, draw) == [Accepted((2,), (2, 2)), Accepted((), (2,))]
    assert calls == [[(0, 0, 0), (1, 0, 0)], [(0, 2, 1)]]


def test_no_rows_draw_nothing() -> None:
    def refuse(level: Sequence[tuple[int, int, int]]) -> list[int]:
        assert not level
        return []

    assert accept([], refuse) == []
    assert accept_typical([], [], lambda nodes: [], refuse) == []


def chances_after(context: Path) -> list[float]:
    """A model's probabilities, from sharp to flat; a few values, so that paths tie."""
    generator = torch.Generator().manual_seed(hash(context) % 2**32)
    logits = torch.randint(0, 4, (NUM_TOKENS,), generator=generator).double()
    return (logits * (hash(context) % 3)).softmax(0).tolist()


def entropy_of(chances: Sequence[float]) -> float:
    return -math.fsum(chance * math.log(chance + 1e-5) for chance in chances)


def typical_reference(row: Tree, rule: TypicalAcceptance) -> Path:
    """Medusa's evaluate_posterior, one path at a time."""

    def steps(node: int) -> list[tuple[float, float]]:
        """Per token on the way: its probability and what it must exceed."""
        found = []
        for at in nodes_to(row, node)[1:]:
            chances = chances_after(context_at(row, row.parents[at]))
            least = min(rule.epsilon, rule.delta * math.exp(-entropy_of(chances)))
            found.append((chances[row.tokens[at]], least))
        return found

    good = [
        node
        for node in range(row.num_nodes)
        if all(chance > least for chance, least in steps(node))
    ]

    def order(node: int) -> tuple[int, float, Path]:
        # Forwards, as the sum of logarithms that it is compared with.
        total = 0.0
        for chance, _ in steps(node):
            total += math.log(chance)
        return -len(nodes_to(row, node)), -total, nodes_to(row, node)

    return nodes_to(row, min(good, key=order))[1:]


rules = st.builds(
    TypicalAcceptance,
    epsilon=st.sampled_from([0.01, 0.09, 0.2, 0.4, 1.0]),
    delta=st.sampled_from([0.1, 0.3, 0.6, 2.0]),
)


@given(st.lists(st.tuples(trees(), rules), max_size=5))
def test_typical_acceptance_is_medusas(pairs: list[tuple[Tree, TypicalAcceptance]]) -> None:
    rows = [row for row, _ in pairs]
    looked: list[tuple[int, int, int]] = []

    def look(level: Sequence[tuple[int, int, int]]) -> list[tuple[float, list[float]]]:
        assert level
        looked.extend(level)
        found = []
        for row, node, depth in level:
            assert depth == len(rows[row].path_to(node))
            chances = chances_after(context_at(rows[row], node))
            children = rows[row].children[node]
            found.append((entropy_of(chances), [chances[rows[row].tokens[c]] for c in children]))
        return found

    def draw(ends: Sequence[tuple[int, int, int]]) -> list[int]:
        return [10 * node + depth for _, node, depth in ends]

    accepted = accept_typical(rows, [rule for _, rule in pairs], look, draw)
    for (row, rule), found in zip(pairs, accepted, strict=True):
        path = typical_reference(row, rule)
        last = path[-1] if path else 0
        drafted = tuple(row.tokens[node] for node in path)
        assert found == Accepted(path, (*drafted, 10 * last + len(path)))
    assert len(looked) == len(set(looked))
    assert all(rows[row].children[node] for row, node, _ in looked)


def accepted_typically(
    row: Tree, chances: dict[int, list[float]], entropy: float = 0.0
) -> Accepted:
    """With epsilon 0.09 and delta 0.3; `chances`: of each node's children."""
    return accept_typical(
        [row],
        [TypicalAcceptance()],
        lambda nodes: [(entropy, chances[node]) for _, node, _ in nodes],
        lambda nodes: [7 for _ in nodes],
    )[0]


def test_the_borders_of_typical_acceptance_are_refused() -> None:
    chain = make_tree((-1, 0), (0, 1))
    border = 0.3 * math.exp(-2.0)
    assert border < 0.09
    for entropy, chance in ((0.0, 0.09), (2.0, border)):
        above = math.nextafter(chance, 1)
        assert accepted_typically(chain, {0: [chance]}, entropy) == Accepted((), (7,))
        assert accepted_typically(chain, {0: [above]}, entropy) == Accepted((1,), (1, 7))


@pytest.mark.parametrize(
    ("second", "path"), [(0.3, (1, 3)), (0.5, (2, 4)), (0.4, (1, 3))], ids=["less", "more", "tie"]
)
def test_of_equally_long_paths_the_likelier_wins_then_the_lower(second: float, path: Path) -> None:
    row = make_tree((-1, 0, 0, 1, 2), (0, 1, 2, 3, 4))
    found = accepted_typically(row, {0: [0.4, 0.4], 1: [0.4], 2: [second]})
    assert found.path == path


def test_a_longer_path_beats_a_likelier() -> None:
    row = make_tree((-1, 0, 0, 2), (0, 1, 2, 3))
    assert accepted_typically(row, {0: [0.8, 0.1], 2: [0.1]}).path == (2, 3)


def test_nan_accepts_nothing() -> None:
    row = make_tree((-1, 0, 1), (0, 1, 2))
    assert accepted_typically(row, {0: [math.nan]}, math.nan) == Accepted((), (7,))
    assert accepted_typically(row, {0: [0.5], 1: [math.nan]}).path == (1,)
