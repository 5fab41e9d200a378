"""What joint training of a LoRA and heads is given, and what it tells; see `train.joint`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from lorastack.errors import InvalidArgumentError
from lorastack.train.lora import LoraModel
from lorastack.train.measure import Measured, Summary, summary
from lorastack.train.options import Epoch, Trained


@dataclass(frozen=True, slots=True, kw_only=True)
class JointOptions:
    """rank: of the LoRA; its scale is 1. learning_rate: the LoRA's. heads_weight: how much the
    heads' losses weigh against the distance from the base."""

    rank: int = 16
    learning_rate: float = 1e-4
    heads_weight: float = 0.01

    def check(self) -> None:
        """Raises InvalidArgumentError naming what cannot be."""
        for option, right, rule in (
            ("--rank", self.rank >= 1, "at least 1"),
            ("--lora-learning-rate", 0 < self.learning_rate < math.inf, "greater than 0"),
            ("--heads-weight", 0 <= self.heads_weight < math.inf, "0 or greater"),
        ):
            if not right:
                raise InvalidArgumentError(f"{option} must be {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far an adapted model is from its base, on the base's own answers. kl: KL(base ||
    adapted) a token, in nats. same: the share of tokens where both hold the same one likeliest."""

    kl: float
    same: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JointEpoch(Epoch):
    """train_drift, held_drift, held_same: see `Drift`. objective: the loss on held-out prompts, its
    ramp at the end."""

    train_drift: float | None = None
    held_drift: float | None = None
    held_same: float | None = None
    objective: float | None = None

    @property
    def worth(self) -> tuple[float, float]:
        """Greater is better: the objective, which counts both sides."""
        return -(self.objective or 0.0), 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the adapted model and its heads are on held-out prompts. lengths: of the answers."""

    measured: Measured
    lengths: list[int]
    drift: Drift

    def summary(self) -> Summary:
        """What the heads are worth."""
        return summary(self.measured, [0, *accumulate(self.lengths)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """trained: its heads as they are written. lora: of the same epoch, rounded alike. held: of both
    as they are written; None without held-out prompts."""

    trained: Trained
    lora: LoraModel
    held: Held | None
