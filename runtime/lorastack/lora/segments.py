"""Which tokens of a step use which LoRA."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorastack.lora.weights import LoraWeights


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end of the step use `weights`, scaled by the request's `scale` (1: as is)."""

    start: int
    end: int
    weights: LoraWeights
    scale: float


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The segments of a step. False when no token has a LoRA.

    Several segments may cover one slice (a stack, added in this order), and one adapter may have
    several segments.
    """

    segments: tuple[Segment, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.segments)

    def select(self, tokens: Sequence[int]) -> LoraBatch:
        """The segments over some of the tokens. tokens: their places in the step, rising."""
        return LoraBatch(
            tuple(
                replace(
                    each, start=bisect_left(tokens, each.start), end=bisect_left(tokens, each.end)
                )
                for each in self.segments
            )
        )
