from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lorastack.speculation.accept import Accepted, DraftedTree, accept
from lorastack.speculation.tree import CHAIN, Tree

TREE = Tree.from_choices(((0,), (1,), (0, 0), (0, 1), (1, 0)), max_nodes=8, max_depth=2)


def next_token(context: tuple[int, ...]) -> int:
    """A model of three tokens whose draw depends on everything before."""
    return hash(context) % 3


def generate(context: tuple[int, ...], length: int) -> tuple[int, ...]:
    for _ in range(length):
        context = (*context, next_token(context))
    return context


def context_at(row: DraftedTree, node: int) -> tuple[int, ...]:
    tokens = [row.tokens[node]]
    while (node := row.tree.parents[node]) >= 0:
        tokens.append(row.tokens[node])
    return tuple(tokens[::-1])


drafted_rows = st.lists(
    st.one_of(
        st.builds(DraftedTree, st.just(TREE), st.tuples(*[st.integers(0, 2)] * TREE.num_nodes)),
        st.builds(DraftedTree, st.just(CHAIN), st.tuples(st.integers(0, 2))),
    ),
    max_size=5,
)


@given(drafted_rows)
def test_tokens_are_those_of_plain_generation_and_only_the_path_is_drawn(
    rows: list[DraftedTree],
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
        assert accepted.tokens[-1] not in {drafted.tokens[c] for c in drafted.tree.children[last]}
        path = (0, *accepted.path)
        assert [at for at in drawn if at[0] == row] == [
            (row, node, depth) for depth, node in enumerate(path)
        ]


def test_twin_siblings_go_to_the_lowest_node() -> None:
    rows = [DraftedTree(TREE, (5, 6, 6, 7, 8, 9))]
    answers = iter([[6], [8], [1]])
    assert accept(rows, lambda level: next(answers)) == [Accepted((1, 4), (6, 8, 1))]


def test_rows_leave_one_by_one() -> None:
    rows = [DraftedTree(TREE, (0, 1, 2, 3, 4, 5)), DraftedTree(CHAIN, (0,))]
    calls: list[list[tuple[int, int, int]]] = []

    def draw(level: Sequence[tuple[int, int, int]]) -> list[int]:
        calls.append(list(level))
        return [2 for _ in level]

    assert accept(rows, draw) == [Accepted((2,), (2, 2)), Accepted((), (2,))]
    assert calls == [[(0, 0, 0), (1, 0, 0)], [(0, 2, 1)]]


def test_no_rows_draw_nothing() -> None:
    def refuse(level: Sequence[tuple[int, int, int]]) -> list[int]:
        raise AssertionError

    assert accept([], refuse) == []
