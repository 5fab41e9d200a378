"""Shapes of draft trees. Pure: ints and tuples only.

A path (a0, a1, ...) takes head 1's a0-th best token, then head 2's a1-th best, and so on (Medusa's
"choices"). A list of paths in order of worth describes trees of every size: its first n entries are
the best tree of n drafted tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import MAX_RANK

Choices = tuple[tuple[int, ...], ...]

_MAX_DEFAULT_CHOICES = 64

# Chance that heads 1 to 5 are right, those before them being right: ratios of the published top-1
# accuracies .560 .316 .201 .147 .118, since a head that is right nearly always has the heads before
# it right too. Of lower ranks one figure is published: head 1's best five hold .78, so its ranks 2
# to 5 share about half of what its first misses.
_TOP1 = (0.560, 0.564, 0.636, 0.731, 0.803)
_SECOND, _RANK_DECAY = 0.22, 0.65


@dataclass(frozen=True, slots=True)
class Tree:
    """A draft tree; nodes sorted by (depth, path), node 0 the root (the row's last token).

    A node's depth is the head that proposes it, counted from 1, and its offset in position.
    """

    parents: tuple[int, ...]  # per node; -1 for the root
    depths: tuple[int, ...]  # per node; 0 for the root
    ranks: tuple[int, ...]  # per node: which of its head's candidates, 0 the best; 0 for the root
    children: tuple[tuple[int, ...], ...]  # per node, best rank first

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """The deepest node's; 0 for the root alone. So many heads are needed."""
        return self.depths[-1]

    @property
    def num_candidates(self) -> int:
        """How many best tokens each head must give; 0 for the root alone."""
        return 1 + max(self.ranks) if self.num_nodes > 1 else 0

    def fill(self, last_token: int, candidates_KR: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Tokens of all nodes. candidates_KR: per head (0-based), its token ids, best first."""
        drafted = (
            candidates_KR[depth - 1][rank]
            for depth, rank in zip(self.depths[1:], self.ranks[1:], strict=True)
        )
        return (last_token, *drafted)

    @staticmethod
    def from_choices(choices: Choices, max_nodes: int, max_depth: int) -> Tree:
        """The tree of the first `max_nodes` usable entries (root not counted), in order of worth.

        An entry is unusable if it is deeper than `max_depth` or its parent is not in the tree yet.
        Raises InvalidArgumentError for an empty path, a rank outside [0, MAX_RANK) or a path named
        twice.
        """
        return _build(choices, max_nodes, max_depth)


@lru_cache(maxsize=1024)
def _build(choices: Choices, max_nodes: int, max_depth: int) -> Tree:
    _check(choices)
    taken: set[tuple[int, ...]] = {()}
    for path in choices:
        if len(taken) > max_nodes:
            break
        if len(path) <= max_depth and path[:-1] in taken:
            taken.add(path)
    paths = sorted(taken, key=lambda path: (len(path), path))
    node_of = {path: node for node, path in enumerate(paths)}
    parents = (-1, *(node_of[path[:-1]] for path in paths[1:]))
    children: list[list[int]] = [[] for _ in paths]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    return Tree(
        parents=parents,
        depths=tuple(len(path) for path in paths),
        ranks=(0, *(path[-1] for path in paths[1:])),
        children=tuple(tuple(nodes) for nodes in children),
    )


def _check(choices: Choices) -> None:
    for path in choices:
        if not path or not all(0 <= rank < MAX_RANK for rank in path):
            raise InvalidArgumentError(
                f"Tree path {list(path)} is invalid: give one or more ranks from 0 to "
                f"{MAX_RANK - 1}.",
                reason=Reason.INVALID_ADAPTER,
            )
    if len(set(choices)) != len(choices):
        repeated = next(path for path in choices if choices.count(path) > 1)
        raise InvalidArgumentError(
            f"Tree path {list(repeated)} is named twice: name it once.",
            reason=Reason.INVALID_ADAPTER,
        )


CHAIN = _build((), 0, 0)  # the root alone: nothing drafted


def _accuracy(head: int, rank: int) -> float:
    """Chance that a head's (0-based) candidate of this rank is drawn, its path being accepted."""
    top1 = _TOP1[min(head, len(_TOP1) - 1)]
    return top1 if rank == 0 else (1 - top1) * _SECOND * _RANK_DECAY ** (rank - 1)


@lru_cache(maxsize=64)
def default_choices(num_heads: int) -> Choices:
    """Paths for heads that bring none, in order of worth under published accuracies.

    Greedy search: from the root, keep adding the neighbour (next sibling or first child) with the
    largest product of chances along its path.
    """
    if num_heads == 0:
        return ()
    # Entries: (-worth, path, worth of the parent).
    frontier: list[tuple[float, tuple[int, ...], float]] = [(-_accuracy(0, 0), (0,), 1.0)]
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < _MAX_DEFAULT_CHOICES and frontier:
        negative_worth, path, parent_worth = heapq.heappop(frontier)
        chosen.append(path)
        depth, sibling = len(path), path[-1] + 1
        if sibling < MAX_RANK:
            worth = parent_worth * _accuracy(depth - 1, sibling)
            heapq.heappush(frontier, (-worth, (*path[:-1], sibling), parent_worth))
        if depth < num_heads:
            worth = -negative_worth * _accuracy(depth, 0)
            heapq.heappush(frontier, (-worth, (*path, 0), -negative_worth))
    return tuple(chosen)
