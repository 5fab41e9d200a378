import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.errors import InvalidArgumentError
from lorastack.layout import MAX_RANK
from lorastack.speculation.tree import CHAIN, Tree, default_choices

WORKED = ((0,), (0, 0), (0, 1), (1,), (1, 0))


def walk(tree: Tree, node: int) -> list[int]:
    """Nodes from the root to `node`, by parents alone."""
    nodes = [node]
    while tree.parents[nodes[-1]] >= 0:
        nodes.append(tree.parents[nodes[-1]])
    return nodes[::-1]


def path_of(tree: Tree, node: int) -> tuple[int, ...]:
    return tuple(tree.ranks[step] for step in walk(tree, node)[1:])


@st.composite
def prefix_closed(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(paths))
        path = (*parent, draw(st.integers(0, 3)))
        if path not in paths:
            paths.append(path)
    return tuple(paths[1:])


def test_the_worked_example_of_the_formats_page() -> None:
    tree = Tree.from_choices(WORKED, max_nodes=24, max_depth=4)
    leaves = [walk(tree, node) for node in range(tree.num_nodes) if not tree.children[node]]
    assert tree.depths == (0, 1, 1, 2, 2, 2)
    assert sorted(leaves, reverse=True) == [[0, 2, 5], [0, 1, 4], [0, 1, 3]]
    assert tree.children == ((1, 2), (3, 4), (5,), (), (), ())
    assert (tree.depth, tree.num_candidates) == (2, 2)


@given(prefix_closed())
def test_masks_equal_brute_force(choices: tuple[tuple[int, ...], ...]) -> None:
    tree = Tree.from_choices(choices, max_nodes=len(choices), max_depth=20)
    paths = [(), *sorted(choices, key=lambda path: (len(path), path))]
    for node, path in enumerate(paths):
        seen = set(walk(tree, node))
        assert seen == {
            other for other, prefix in enumerate(paths) if path[: len(prefix)] == prefix
        }
        assert path_of(tree, node) == path
        assert tree.depths[node] == len(path)
        assert set(tree.children[node]) == {
            other for other in range(len(paths)) if tree.parents[other] == node
        }


@given(prefix_closed(), st.integers(0, 12), st.integers(0, 4))
def test_limits_take_the_first_usable_entries(
    choices: tuple[tuple[int, ...], ...], max_nodes: int, max_depth: int
) -> None:
    tree = Tree.from_choices(choices, max_nodes=max_nodes, max_depth=max_depth)
    usable = [path for path in choices if len(path) <= max_depth][:max_nodes]
    assert {path_of(tree, node) for node in range(1, tree.num_nodes)} == set(usable)
    assert tree.depth == max(map(len, usable), default=0)


def test_an_entry_without_its_parent_is_skipped() -> None:
    tree = Tree.from_choices(((1, 0), (0,), (0, 1)), max_nodes=2, max_depth=4)
    assert [path_of(tree, node) for node in range(tree.num_nodes)] == [(), (0,), (0, 1)]


@pytest.mark.parametrize("choices", [((),), ((-1,),), ((MAX_RANK,),), ((0,), (0,))])
def test_invalid_choices_are_refused(choices: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        Tree.from_choices(choices, max_nodes=1, max_depth=1)


def test_fill_takes_each_heads_candidate_of_the_nodes_rank() -> None:
    tree = Tree.from_choices(WORKED, max_nodes=24, max_depth=4)
    assert tree.fill(7, [[10, 11], [20, 21]]) == (7, 10, 11, 20, 21, 20)
    assert CHAIN.fill(7, []) == (7,)
    assert (CHAIN.num_nodes, CHAIN.depth, CHAIN.num_candidates) == (1, 0, 0)


@pytest.mark.parametrize("num_heads", [0, 1, 3, 4, 7])
def test_default_choices_are_prefix_closed_and_within_their_heads(num_heads: int) -> None:
    choices = default_choices(num_heads)
    for index, path in enumerate(choices):
        assert len(path) <= num_heads
        assert not path[:-1] or path[:-1] in choices[:index]
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in choices[:index]
    assert Tree.from_choices(choices, 64, num_heads).num_nodes == 1 + len(choices)


def test_default_choices_of_four_heads_mix_depth_and_width() -> None:
    tree = Tree.from_choices(default_choices(4), max_nodes=8, max_depth=4)
    assert tree.depth >= 3
    assert len(tree.children[0]) >= 2
