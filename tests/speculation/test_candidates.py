from itertools import count, pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.request import TokenSource
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.candidates import Candidates, Chain, Node, forced, grow, looked_up
from lorastack.speculation.lookup import Continuation
from lorastack.speculation.proposal import Proposal

ENOUGH = 10_000
Path = tuple[int, ...]


class Sources(NamedTuple):
    proposal: Proposal | None
    chains: tuple[Chain, ...] = ()


HEAD = Proposal(((1, 2),), ((-0.01, -5.0),))


@st.composite
def sources(draw: st.DrawFn) -> Sources:
    """Up to three heads of up to three candidates, a looked-up and a forced chain."""
    ids, logprobs = [], []
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        logs = draw(st.lists(st.floats(-9.0, 0.0), min_size=len(tokens), max_size=len(tokens)))
        ids.append(tuple(tokens))
        logprobs.append(tuple(sorted(logs, reverse=True)))
    proposal = Proposal(tuple(ids), tuple(logprobs)) if ids else None
    tokens = st.lists(st.integers(0, 4), max_size=4)
    continuation = Continuation(draw(st.integers(2, 16)), tuple(draw(tokens)))
    return Sources(proposal, (looked_up(continuation, Calibration()), forced(draw(tokens))))


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    """Used ones, that have turned some orders around."""
    calibration = Calibration()
    for _ in range(draw(st.integers(0, 3))):
        head, log = draw(st.integers(0, 2)), draw(st.floats(-9.0, 0.0))
        for _ in range(20):
            calibration.record(head, log, draw(st.booleans()))
    return calibration


def chances(given_: Sources, calibration: Calibration, path: Path) -> dict[int, float]:
    """Of every token that may follow `path`."""
    depth = len(path)
    found: dict[int, float] = {}
    proposal = given_.proposal
    if proposal is not None and depth < len(proposal.ids):
        for token, log in zip(proposal.ids[depth], proposal.logprobs[depth], strict=True):
            found[token] = calibration.probabilities(depth, (log,))[0]
    for chain in given_.chains:
        if path == tuple(chain.tokens[:depth]) and depth < len(chain.tokens):
            token, chance = chain.tokens[depth], chain.chances[depth]
            own = found.pop(token, 0.0)
            found = {other: right * (1 - chance) for other, right in found.items()}
            found[token] = max(own, chance)
    return found


def all_worths(given_: Sources, calibration: Calibration, max_depth: int) -> dict[Path, float]:
    worths: dict[Path, float] = {(): 1.0}
    todo: list[Path] = [()]
    for path in todo:
        if len(path) < max_depth:
            for token, chance in chances(given_, calibration, path).items():
                worths[*path, token] = worths[path] * chance
                todo.append((*path, token))
    return worths


def paths_of(nodes: list[Node]) -> list[Path]:
    paths: list[Path] = [()]
    for node in nodes:
        paths.append((*paths[node.parent], node.token))
    return paths[1:]


@given(sources(), calibrations(), st.integers(0, 5))
def test_candidates_are_every_node_once_best_first(
    given_: Sources, calibration: Calibration, max_depth: int
) -> None:
    nodes = list(grow(*given_, calibration, ENOUGH, max_depth))
    expected = all_worths(given_, calibration, max_depth)
    paths = paths_of(nodes)
    assert sorted([(), *paths]) == sorted(expected)
    for place, (node, path) in enumerate(zip(nodes, paths, strict=True), start=1):
        assert node.worth == pytest.approx(expected[path])
        assert node.depth == len(path)
        assert node.parent < place
    assert all(before.worth >= after.worth for before, after in pairwise(nodes))


@given(sources(), calibrations(), st.integers(0, 12))
def test_the_first_nodes_are_the_best_tree_of_their_number(
    given_: Sources, calibration: Calibration, max_nodes: int
) -> None:
    nodes = list(grow(*given_, calibration, max_nodes, 3))
    worths = all_worths(given_, calibration, 3)
    del worths[()]
    best = sorted(worths.values(), reverse=True)[:max_nodes]
    assert [node.worth for node in nodes] == pytest.approx(best)


@given(sources(), calibrations(), st.data())
def test_the_first_candidates_are_a_tree(
    given_: Sources, calibration: Calibration, data: st.DataObject
) -> None:
    candidates = Candidates(*given_, calibration, max_nodes=12, max_depth=4)
    worths = list(candidates.worths())
    size = data.draw(st.integers(0, len(worths)))
    tree = candidates.tree(7, size)
    assert tree.num_nodes == 1 + size
    assert (tree.tokens[0], tree.parents[0]) == (7, -1)
    depths = [len(tree.path_to(node)) for node in range(1, 1 + size)]
    assert depths == [node.depth for node in candidates.nodes[:size]]
    for children in tree.children:
        tokens = [tree.tokens[child] for child in children]
        assert len(set(tokens)) == len(tokens)


def test_a_node_belongs_to_the_surest_source() -> None:
    chain = looked_up(Continuation(16, (2, 9)), Calibration())
    nodes = list(grow(HEAD, [chain], Calibration(), ENOUGH, 4))
    sources = {path: node.source for path, node in zip(paths_of(nodes), nodes, strict=True)}
    assert sources == {
        (1,): TokenSource.HEADS,
        (2,): TokenSource.PROMPT_LOOKUP,
        (2, 9): TokenSource.PROMPT_LOOKUP,
    }


def test_forced_tokens_come_first_and_leave_little_to_others() -> None:
    nodes = list(grow(HEAD, [forced((3, 4, 5))], Calibration(), 3, 8))
    assert [(node.token, node.source) for node in nodes] == [
        (token, TokenSource.GRAMMAR) for token in (3, 4, 5)
    ]


def test_nodes_are_made_only_when_asked_for() -> None:
    reads = count()

    class Reading(Calibration):
        def probabilities(self, head: int, logprobs: object) -> list[float]:
            next(reads)
            return [0.5]

    proposal = Proposal(((1,), (2,)), ((-1.0,), (-1.0,)))
    candidates = Candidates(proposal, (), Reading(), max_nodes=8, max_depth=8)
    worths = candidates.worths()
    assert next(worths) == 0.5
    assert next(reads) == 1  # the first head's alone
    assert list(candidates.worths()) == [0.5, 0.25]


def test_nothing_proposed_gives_nothing() -> None:
    assert list(grow(None, (), Calibration(), 8, 8)) == []
    assert list(grow(HEAD, (), Calibration(), 0, 8)) == []
    assert list(grow(HEAD, (), Calibration(), 8, 0)) == []
