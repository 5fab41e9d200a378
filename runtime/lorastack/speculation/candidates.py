"""The nodes that may enter a row's tree, out of all its sources, best first. Pure.

A node is worth the chance that it is accepted: its parent's worth times its own chance once the
parent is. No node is worth more than its parent or the sibling before it, so the first n nodes
are a tree, and no tree of n nodes is worth more.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count, repeat
from typing import NamedTuple

from lorastack.request import TokenSource
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.lookup import Continuation
from lorastack.speculation.proposal import Proposal
from lorastack.speculation.tree import Tree

FORCED = 0.98  # chance of a token that a grammar forces: the text may come in other tokens


class Node(NamedTuple):
    """parent: its place in order of worth, from 1; 0 is the root. depth: 0 at the root."""

    parent: int
    token: int
    source: TokenSource
    worth: float
    depth: int


class Chain(NamedTuple):
    """Tokens that a source expects one after the other, behind the row's last token."""

    tokens: Sequence[int]
    chances: Sequence[float]  # of each token, once those before it are accepted
    source: TokenSource


def looked_up(continuation: Continuation, calibration: Calibration) -> Chain:
    """The chain of what `Lookup.find` gave."""
    match, tokens = continuation
    chances = [calibration.lookup_probability(match, depth) for depth in range(len(tokens))]
    return Chain(tokens, chances, TokenSource.PROMPT_LOOKUP)


def forced(tokens: Sequence[int]) -> Chain:
    """The chain of tokens that a grammar leaves no choice but to follow."""
    return Chain(tokens, [FORCED] * len(tokens), TokenSource.GRAMMAR)


class Candidates:
    """The nodes that may enter a row's tree, best first, made as they are asked for."""

    def __init__(
        self,
        proposal: Proposal | None,
        chains: Sequence[Chain],
        calibration: Calibration,
        *,
        max_nodes: int,
        max_depth: int,
    ) -> None:
        """The arguments of `grow`."""
        self._more = grow(proposal, chains, calibration, max_nodes, max_depth)
        self.nodes: list[Node] = []  # made so far

    def worths(self) -> Iterator[float]:
        """The worths of all nodes, best first."""
        yield from (node.worth for node in self.nodes)
        for node in self._more:
            self.nodes.append(node)
            yield node.worth

    def tree(self, last_token: int, count: int) -> Tree:
        """The row's last token and the best `count` nodes, which `worths` must have reached."""
        nodes = self.nodes[:count]
        return Tree(
            (last_token, *[node.token for node in nodes]),
            (-1, *[node.parent for node in nodes]),
            (TokenSource.MODEL, *[node.source for node in nodes]),
        )


def grow(
    proposal: Proposal | None,
    chains: Sequence[Chain],
    calibration: Calibration,
    max_nodes: int,
    max_depth: int,
) -> Iterator[Node]:
    """The nodes that a row's heads and chains give, in order of worth, up to both limits."""
    by_heads: dict[int, list[_Candidate]] = {}
    frontier: list[tuple[float, int, _Siblings, int]] = []  # -worth, order of ties, which sibling
    order = count()

    def push(siblings: _Siblings, index: int) -> None:
        if index < len(siblings.candidates):
            worth = siblings.worth * siblings.candidates[index][0]
            heapq.heappush(frontier, (-worth, next(order), siblings, index))

    def expand(node: int, worth: float, depth: int, chains: Sequence[Chain]) -> None:
        if depth == max_depth:
            return
        if depth not in by_heads:
            by_heads[depth] = _of_heads(proposal, calibration, depth)
        candidates = by_heads[depth]
        for chain in chains:
            candidates = _joined(candidates, chain, depth)
        push(_Siblings(node, worth, depth, chains, candidates), 0)

    expand(0, 1.0, 0, [chain for chain in chains if chain.tokens])
    for node in range(1, max_nodes + 1):
        if not frontier:
            return
        negative, _, siblings, index = heapq.heappop(frontier)
        parent, _, depth, chains, candidates = siblings
        _, token, source = candidates[index]
        yield Node(parent, token, source, -negative, depth + 1)
        push(siblings, index + 1)
        chains = [c for c in chains if c.tokens[depth] == token and len(c.tokens) > depth + 1]
        expand(node, -negative, depth + 1, chains)


# (chance once its parent is accepted, token, source)
_Candidate = tuple[float, int, TokenSource]


class _Siblings(NamedTuple):
    """What may follow one node, best first."""

    parent: int
    worth: float  # the parent's
    depth: int  # the parent's
    chains: Sequence[Chain]  # those that go on after it
    candidates: Sequence[_Candidate]


def _of_heads(proposal: Proposal | None, calibration: Calibration, depth: int) -> list[_Candidate]:
    if proposal is None or depth >= len(proposal.ids):
        return []
    chances = calibration.probabilities(depth, proposal.logprobs[depth])
    # What was learnt may turn the heads' own order around.
    return sorted(zip(chances, proposal.ids[depth], repeat(TokenSource.HEADS)), reverse=True)


def _joined(candidates: list[_Candidate], chain: Chain, depth: int) -> list[_Candidate]:
    """The candidates with the chain's token among them; others are right only where it is wrong.

    A token of both belongs to the surer source, with that source's chance.
    """
    new, chance = chain.tokens[depth], chain.chances[depth]
    joined = [(chance, new, chain.source)]
    for own, token, source in candidates:
        if token != new:
            joined.append((own * (1 - chance), token, source))
        elif own >= chance:
            joined[0] = own, token, source
    joined.sort(reverse=True)
    return joined
