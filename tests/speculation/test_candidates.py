from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.request import TokenSource
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.candidates import Node, Proposals, Stream, forced, grow, looked_up

ENOUGH = 10_000
Path = tuple[int, ...]


@st.composite
def proposals(draw: st.DrawFn) -> Proposals:
    """Up to three heads of up to three candidates, a looked-up and a forced chain."""
    ids, logprobs = [], []
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        logs = draw(st.lists(st.floats(-9.0, 0.0), min_size=len(tokens), max_size=len(tokens)))
        ids.append(tokens)
        logprobs.append(sorted(logs, reverse=True))
    tokens = st.lists(st.integers(0, 4), max_size=4)
    lookup = looked_up(draw(st.integers(2, 16)), draw(tokens), Calibration())
    return Proposals(ids, logprobs, (lookup, forced(draw(tokens))))


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    """Used ones, that have turned some orders around."""
    calibration = Calibration()
    for _ in range(draw(st.integers(0, 3))):
        head, log = draw(st.integers(0, 2)), draw(st.floats(-9.0, 0.0))
        for _ in range(20):
            calibration.record(head, log, draw(st.booleans()))
    return calibration


def chances(given_: Proposals, calibration: Calibration, path: Path) -> dict[int, float]:
    """Of every token that may follow `path`."""
    depth = len(path)
    found: dict[int, float] = {}
    if depth < len(given_.ids):
        for token, log in zip(given_.ids[depth], given_.logprobs[depth], strict=True):
            found[token] = calibration.probabilities(depth, (log,))[0]
    for chain in given_.chains:
        if path == tuple(chain.tokens[:depth]) and depth < len(chain.tokens):
            token, chance = chain.tokens[depth], chain.chances[depth]
            own = found.pop(token, 0.0)
            found = {other: right * (1 - chance) for other, right in found.items()}
            found[token] = max(own, chance)
    return found


def all_worths(given_: Proposals, calibration: Calibration, max_depth: int) -> dict[Path, float]:
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


@given(proposals(), calibrations(), st.integers(0, 5))
def test_the_stream_is_every_node_once_best_first(
    given_: Proposals, calibration: Calibration, max_depth: int
) -> None:
    nodes = list(grow(given_, calibration, ENOUGH, max_depth))
    expected = all_worths(given_, calibration, max_depth)
    paths = paths_of(nodes)
    assert sorted([(), *paths]) == sorted(expected)
    for place, (node, path) in enumerate(zip(nodes, paths, strict=True), start=1):
        assert node.worth == pytest.approx(expected[path])
        assert node.depth == len(path)
        assert node.parent < place
    assert all(before.worth >= after.worth for before, after in pairwise(nodes))


@given(proposals(), calibrations(), st.integers(0, 12))
def test_the_first_nodes_are_the_best_tree_of_their_number(
    given_: Proposals, calibration: Calibration, max_nodes: int
) -> None:
    nodes = list(grow(given_, calibration, max_nodes, 3))
    worths = all_worths(given_, calibration, 3)
    del worths[()]
    best = sorted(worths.values(), reverse=True)[:max_nodes]
    assert [node.worth for node in nodes] == pytest.approx(best)


@given(proposals(), calibrations(), st.data())
def test_a_prefix_of_the_stream_is_a_tree(
    given_: Proposals, calibration: Calibration, data: st.DataObject
) -> None:
    stream = Stream(given_, calibration, max_nodes=12, max_depth=4)
    worths = list(stream.worths())
    size = data.draw(st.integers(0, len(worths)))
    drafted = stream.drafted(7, size)
    assert drafted.num_nodes == 1 + size
    assert (drafted.tokens[0], drafted.parents[0]) == (7, -1)
    depths = [len(drafted.path_to(node)) for node in range(1, 1 + size)]
    assert depths == [node.depth for node in stream.nodes[:size]]
    for children in drafted.children:
        tokens = [drafted.tokens[child] for child in children]
        assert len(set(tokens)) == len(tokens)


def test_a_node_belongs_to_the_surest_source() -> None:
    chain = looked_up(16, (2, 9), Calibration())
    given_ = Proposals([(1, 2)], [(-0.01, -5.0)], (chain,))
    nodes = list(grow(given_, Calibration(), ENOUGH, 4))
    sources = {path: node.source for path, node in zip(paths_of(nodes), nodes, strict=True)}
    assert sources == {
        (1,): TokenSource.HEADS,
        (2,): TokenSource.PROMPT_LOOKUP,
        (2, 9): TokenSource.PROMPT_LOOKUP,
    }


def test_forced_tokens_come_first_and_leave_little_to_others() -> None:
    given_ = Proposals([(1, 2)], [(-0.01, -5.0)], (forced((3, 4, 5)),))
    nodes = list(grow(given_, Calibration(), 3, 8))
    assert [(node.token, node.source) for node in nodes] == [
        (token, TokenSource.GRAMMAR) for token in (3, 4, 5)
    ]


def test_nodes_are_found_only_when_asked_for() -> None:
    reads = count()

    class Reading(Calibration):
        def probabilities(self, head: int, logprobs: object) -> list[float]:
            next(reads)
            return [0.5]

    stream = Stream(Proposals([(1,), (2,)], [(-1.0,), (-1.0,)]), Reading(), 8, 8)
    worths = stream.worths()
    assert next(worths) == 0.5
    assert next(reads) == 1  # the first head's alone
    assert list(stream.worths()) == [0.5, 0.25]


def test_nothing_proposed_gives_nothing() -> None:
    assert list(grow(Proposals(), Calibration(), 8, 8)) == []
    assert list(grow(Proposals([(1,)], [(-1.0,)]), Calibration(), 0, 8)) == []
    assert list(grow(Proposals([(1,)], [(-1.0,)]), Calibration(), 8, 0)) == []
