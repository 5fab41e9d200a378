"""A row's draft tree of one step, tokens included. Pure."""

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
        """The root alone: nothing drafted."""
        return Tree((token,), (-1,), (TokenSource.MODEL,))

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return len(self.tokens)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per node, in the order of nodes."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`."""
        for child in self.children[node]:
            if self.tokens[child] == token:
                return child
        return None

    def path_to(self, node: int) -> list[int]:
        """Tokens behind the root's, down to the node's own."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]
