"""One stream of draft nodes out of all that a row's sources propose, best first. Pure.

A node is worth the chance that it is accepted: its parent's worth times its own chance once the
parent is. No node is worth more than its parent or the sibling before it, so the first n nodes of
the stream are a tree, and none of n nodes is worth more.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

from lorastack.request import TokenSource
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.drafted import Drafted

FORCED = 0.98  # chance of a token that a grammar forces: it may go on in other tokens


class Node(NamedTuple):
    """parent: its place in the stream, counted from 1; 0 is the root. depth: the root's is 0."""

    parent: int
    token: int
    source: TokenSource
    worth: float
    depth: int


# (chance that it follows its parent, token, source)
Candidate = tuple[float, int, TokenSource]


class Proposals(NamedTuple):
    """What a row's sources propose from its last token on; each may be empty.

    ids, logprobs: of heads, [head][rank], best first. lookup: tokens, and the match's length.
    """

    ids: Sequence[Sequence[int]] = ()
    logprobs: Sequence[Sequence[float]] = ()
    lookup: Sequence[int] = ()
    match: int = 0
    forced: Sequence[int] = ()


class Stream:
    """A row's nodes, found as they are asked for."""

    def __init__(
        self, proposals: Proposals, calibration: Calibration, max_nodes: int, max_depth: int
    ) -> None:
        self._more = grow(proposals, calibration, max_nodes, max_depth)
        self.nodes: list[Node] = []  # found so far

    def worths(self) -> Iterator[float]:
        """Of all nodes, best first."""
        yield from (node.worth for node in self.nodes)
        for node in self._more:
            self.nodes.append(node)
            yield node.worth

    def drafted(self, last_token: int, count: int) -> Drafted:
        """The tree of the best `count` nodes, which must have been found."""
        nodes = self.nodes[:count]
        return Drafted(
            (last_token, *[node.token for node in nodes]),
            (-1, *[node.parent for node in nodes]),
            (TokenSource.MODEL, *[node.source for node in nodes]),
        )


def grow(
    proposals: Proposals, calibration: Calibration, max_nodes: int, max_depth: int
) -> Iterator[Node]:
    """Nodes in order of worth, as many as there are up to the limits."""
    if max_nodes < 1:
        return
    followers = _Followers(proposals, calibration, max_depth)
    frontier: list[tuple[float, int, _Siblings, int]] = []  # -worth, order of ties, which sibling
    found = serial = 0
    siblings, index = _Siblings(0, 1.0, 1, _ALL, followers.of(_ALL, 0)), 0
    _push(frontier, serial, siblings, 0)
    while frontier:
        negative, _, siblings, index = heapq.heappop(frontier)
        parent, _, depth, chains, candidates = siblings
        _, token, source = candidates[index]
        found += 1
        yield Node(parent, token, source, -negative, depth)
        if found == max_nodes:
            return
        serial += 2
        _push(frontier, serial, siblings, index + 1)
        chains = followers.chains(chains, depth - 1, token)
        children = followers.of(chains, depth)
        below = _Siblings(found, -negative, depth + 1, chains, children)
        _push(frontier, serial + 1, below, 0)


# Chains that the way from the root to a node may be a beginning of.
_LOOKUP, _FORCED = 1, 2
_ALL = _LOOKUP | _FORCED


class _Siblings(NamedTuple):
    """What may follow one node, best first."""

    parent: int
    parent_worth: float
    depth: int  # theirs
    chains: int  # of the parent
    candidates: Sequence[Candidate]


def _push(
    frontier: list[tuple[float, int, _Siblings, int]], serial: int, siblings: _Siblings, index: int
) -> None:
    if index < len(siblings.candidates):
        worth = siblings.parent_worth * siblings.candidates[index][0]
        heapq.heappush(frontier, (-worth, serial, siblings, index))


class _Followers:
    """What may follow a node, by its depth and by the chains that it is on."""

    def __init__(self, proposals: Proposals, calibration: Calibration, max_depth: int) -> None:
        self._proposals = proposals
        self._calibration = calibration
        self._max_depth = max_depth
        self._by_heads: dict[int, list[Candidate]] = {}

    def chains(self, chains: int, depth: int, token: int) -> int:
        """Those of a node's chains that go on with `token`. depth: the node's."""
        lookup, forced = self._proposals.lookup, self._proposals.forced
        if chains & _LOOKUP and not (depth < len(lookup) and lookup[depth] == token):
            chains &= ~_LOOKUP
        if chains & _FORCED and not (depth < len(forced) and forced[depth] == token):
            chains &= ~_FORCED
        return chains

    def of(self, chains: int, depth: int) -> Sequence[Candidate]:
        """Best first; a token that several sources propose has the surest one's chance."""
        if depth >= self._max_depth:
            return ()
        if depth not in self._by_heads:
            self._by_heads[depth] = self._heads(depth)
        candidates = self._by_heads[depth]
        lookup, match = self._proposals.lookup, self._proposals.match
        if chains & _LOOKUP and depth < len(lookup):
            probability = self._calibration.lookup_probability(match, depth)
            candidates = _merged(
                candidates, (probability, lookup[depth], TokenSource.PROMPT_LOOKUP)
            )
        forced = self._proposals.forced
        if chains & _FORCED and depth < len(forced):
            rest = [(chance * (1 - FORCED), token, source) for chance, token, source in candidates]
            candidates = _merged(rest, (FORCED, forced[depth], TokenSource.GRAMMAR))
        return candidates

    def _heads(self, depth: int) -> list[Candidate]:
        ids, logprobs = self._proposals.ids, self._proposals.logprobs
        if depth >= len(ids):
            return []
        chances = self._calibration.probabilities(depth, logprobs[depth])
        # What was learnt may turn the heads' own order around.
        return sorted(zip(chances, ids[depth], repeat(TokenSource.HEADS)), reverse=True)


def _merged(candidates: list[Candidate], new: Candidate) -> list[Candidate]:
    """With one more, unless its token is there already and surer."""
    chance, token, _ = new
    if any(other[1] == token and other[0] >= chance for other in candidates):
        return candidates
    return sorted([new, *[other for other in candidates if other[1] != token]], reverse=True)
