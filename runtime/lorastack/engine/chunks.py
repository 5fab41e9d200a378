"""How much of their prompts the rows of a step take in."""

from __future__ import annotations

from dataclasses import dataclass

from lorastack.engine.row import Row

# Prompt tokens of a step that get log-probabilities: their logits are [64, V] float32, 32 MiB for
# 128k tokens, however many rows ask and however long their prompts are.
MAX_SCORED = 64


@dataclass(slots=True)
class ChunkBudget:
    """What is left of a step for prompts. tokens: of all; scored: of those, with logits."""

    tokens: int
    scored: int = MAX_SCORED

    def chunk(self, row: Row) -> int:
        """How many of the row's tokens without KV there is room for."""
        most = min(row.num_pending, self.tokens)
        if row.lists_prompt:
            most = min(most, row.num_unscored + self.scored)
        return max(most, 0)

    def admits(self, row: Row) -> bool:
        """True if a waiting row would get a chunk, whatever it finds in the prefix cache."""
        return self.tokens > 0 and (self.scored > 0 or not row.lists_prompt)

    def take(self, row: Row, num_tokens: int) -> None:
        """The row's chunk is planned, of at most `chunk` tokens."""
        self.tokens -= num_tokens
        if row.lists_prompt:
            self.scored -= max(num_tokens - row.num_unscored, 0)
