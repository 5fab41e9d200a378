"""Which drafted tokens stand: the "match" rule, lossless for any draft.

Draw at the root what the model draws there, descend to the child that equals the draw, stop at a
mismatch. Every token comes from a draw of its own position, so the drafts change how many tokens a
step gives, never which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorastack.speculation.tree import Tree

# (row, node, depth) triples of rows still descending -> the token drawn at each. `depth` is the
# number of tokens accepted before: the draw's generated index counts from the row's own.
Draw = Callable[[Sequence[tuple[int, int, int]]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class DraftedTree:
    """A row's tree of this step. tokens: per node; tokens[0] is the row's last token."""

    tree: Tree
    tokens: tuple[int, ...]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, the lowest where siblings carry the same."""
        for child in self.tree.children[node]:
            if self.tokens[child] == token:
                return child
        return None


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a row gained.

    path: accepted nodes, the root left out. tokens: theirs and the last draw, which was drafted
    nowhere below the path: always one more than `path`.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]


def accept(rows: Sequence[DraftedTree], draw: Draw) -> list[Accepted]:
    """Descend all rows' trees level by level; one call of `draw` a level.

    Nodes off the accepted path are never drawn.
    """
    paths: list[list[int]] = [[] for _ in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    level = [(row, 0, 0) for row in range(len(rows))]
    while level:
        descending = []
        for (row, node, depth), token in zip(level, draw(level), strict=True):
            tokens[row].append(token)
            child = rows[row].child(node, token)
            if child is not None:
                paths[row].append(child)
                descending.append((row, child, depth + 1))
        level = descending
    return [Accepted(tuple(path), tuple(drawn)) for path, drawn in zip(paths, tokens, strict=True)]
