"""The tree of nodes that one row brings to a step. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lorastack.request import TokenSource


@dataclass(frozen=True)
class Tree:
    """Nodes in any order in which parents come before their children; node 0 is the root.

    Siblings carry distinct tokens, so a token leads to at most one child.
    """

    tokens: tuple[int, ...]  # per node; the root's is the row's last token
    parents: tuple[int, ...]  # per node; -1 for the root
    sources: tuple[TokenSource, ...]  # per node; MODEL for the root

    @staticmethod
    def root(token: int) -> Tree:
        """A tree of the root alone."""
        return Tree((token,), (-1,), (TokenSource.MODEL,))

    @property
    def num_nodes(self) -> int:
        """The root counts as well."""
        return len(self.tokens)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per node, its children in ascending order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`; None if there is none."""
        for child in self.children[node]:
            if self.tokens[child] == token:
                return child
        return None

    def path_to(self, node: int) -> list[int]:
        """The tokens from below the root down to the node's own."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]
