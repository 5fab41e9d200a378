from hypothesis import given
from hypothesis import strategies as st

from lorastack.request import TokenSource
from lorastack.speculation.tree import Tree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Trees of a few tokens, in random topological orders."""
    tokens, parents = [draw(st.integers(0, 4))], [-1]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(0, len(tokens) - 1))
        taken = {tokens[node] for node, above in enumerate(parents) if above == parent}
        token = draw(st.integers(0, 4))
        if token not in taken:
            tokens.append(token)
            parents.append(parent)
    sources = (TokenSource.MODEL, *[TokenSource.HEADS] * (len(tokens) - 1))
    return Tree(tuple(tokens), tuple(parents), sources)


def test_the_worked_example_of_the_formats_page() -> None:
    heads = TokenSource.HEADS
    drafted = Tree((7, 10, 11, 20, 21, 20), (-1, 0, 0, 1, 1, 2), (TokenSource.MODEL, *[heads] * 5))
    assert drafted.num_nodes == 6
    assert [drafted.path_to(node) for node in (0, 2, 5)] == [[], [11], [11, 20]]
    assert drafted.children == ((1, 2), (3, 4), (5,), (), (), ())
    assert (drafted.child(1, 20), drafted.child(2, 20), drafted.child(2, 21)) == (3, 5, None)


@given(trees())
def test_derived_fields_follow_the_parents(drafted: Tree) -> None:
    for node in range(drafted.num_nodes):
        above = []
        at = node
        while (at := drafted.parents[at]) >= 0:
            above.append(at)
        assert drafted.path_to(node) == [drafted.tokens[n] for n in (node, *above) if n][::-1]
        assert set(drafted.children[node]) == {
            other for other in range(drafted.num_nodes) if drafted.parents[other] == node
        }
        assert list(drafted.children[node]) == sorted(drafted.children[node])


@given(trees(), st.integers(0, 5))
def test_a_token_leads_to_the_child_that_carries_it(drafted: Tree, token: int) -> None:
    for node in range(drafted.num_nodes):
        child = drafted.child(node, token)
        carriers = [c for c in drafted.children[node] if drafted.tokens[c] == token]
        assert carriers == ([] if child is None else [child])


def test_a_root_alone_drafts_nothing() -> None:
    root = Tree.root(5)
    assert (root.num_nodes, root.children) == (1, ((),))
    assert root.sources == (TokenSource.MODEL,)
    assert root.child(0, 5) is None
