"""Which nodes of a tree are accepted. Pure.

`accept` is the "match" rule, lossless for any tree: sample at the root what the model samples
there, descend to the child that equals it, stop at a mismatch. Every token is sampled at its own
position, so the tree changes how many tokens a step gives, never which.

`accept_typical` is Medusa's rule, which is NOT lossless: it takes drafted tokens that the model
finds likely enough, whatever it would have sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorastack.request import TypicalAcceptance
from lorastack.speculation.tree import Tree

# (row, node, depth) triples. depth: 0 at the root, so it also counts the tokens that the row gains
# in this step before the one that is sampled here.
Nodes = Sequence[tuple[int, int, int]]
# Nodes -> the token sampled at each.
SampleAt = Callable[[Nodes], Sequence[int]]
# Nodes -> the entropy of what may follow each, and the probabilities of its children's tokens.
LookAt = Callable[[Nodes], Sequence[tuple[float, Sequence[float]]]]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a row gained.

    path: accepted nodes, the root left out. tokens: theirs, then the sample at the path's end, so
    always one more than `path`.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]


def accept(rows: Sequence[Tree], sample: SampleAt) -> list[Accepted]:
    """Descend all rows' trees level by level; one call of `sample` a level.

    Nodes off the accepted path are never sampled.
    """
    paths: list[list[int]] = [[] for _ in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    level = [(row, 0, 0) for row in range(len(rows))]
    while level:
        descending = []
        for (row, node, depth), token in zip(level, sample(level), strict=True):
            tokens[row].append(token)
            child = rows[row].child(node, token)
            if child is not None:
                paths[row].append(child)
                descending.append((row, child, depth + 1))
        level = descending
    return [Accepted(tuple(path), tuple(own)) for path, own in zip(paths, tokens, strict=True)]


def accept_typical(
    rows: Sequence[Tree], rules: Sequence[TypicalAcceptance], look: LookAt, sample: SampleAt
) -> list[Accepted]:
    """Medusa's typical acceptance. NOT lossless: the trees decide which tokens come.

    A child is accepted if its parent is and p(child) > min(epsilon, delta * exp(-H)), H being the
    entropy at the parent. The longest accepted path wins, ties go to the greatest sum of log p,
    then to the lowest nodes. `look` is called once a level, for accepted nodes with children;
    `sample` once, at the ends of the paths. A probability that is NaN accepts nothing.

    rules: one a row. Source: FasterDecoding/Medusa, evaluate_posterior.
    """
    best: list[tuple[int, ...]] = [() for _ in rows]
    level: list[tuple[int, float, tuple[int, ...]]] = [(row, 0.0, ()) for row in range(len(rows))]
    while level := [state for state in level if rows[state[0]].children[_end(state[2])]]:
        longer = []
        seen = look([(row, _end(path), len(path)) for row, _, path in level])
        for (row, total, path), (entropy, chances) in zip(level, seen, strict=True):
            least = min(rules[row].epsilon, rules[row].delta * math.exp(-entropy))
            for child, chance in zip(rows[row].children[_end(path)], chances, strict=True):
                if chance > least:
                    longer.append((row, total + math.log(chance), (*path, child)))
        # A path of this level is longer than those before; the best of a row comes last and stays.
        for row, _, path in sorted(longer, key=lambda state: (-state[1], state[2]), reverse=True):
            best[row] = path
        level = longer
    last = sample([(row, _end(path), len(path)) for row, path in enumerate(best)])
    return [
        Accepted(path, (*(tree.tokens[node] for node in path), token))
        for tree, path, token in zip(rows, best, last, strict=True)
    ]


def _end(path: tuple[int, ...]) -> int:
    return path[-1] if path else 0
