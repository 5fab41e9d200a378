"""What a training run is given, and what it tells.

Shape suffixes: K heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorastack.errors import InvalidArgumentError
from lorastack.train.heads import MedusaHeads

LEARNING_RATE, PRIVATE_LEARNING_RATE = 1e-3, 1e-2  # low-rank parts gain by larger steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """held_out: share of the prompts; 0 for none, and then no epoch is judged.

    warmup: share of the steps. patience: epochs that end the training if they gain neither tokens a
    step nor loss on held-out prompts. soft_targets: learn the base's distribution over its
    likeliest tokens, which the corpus has, in place of the token that came.
    """

    epochs: int = 6
    batch_size: int = 2048
    learning_rate: float = LEARNING_RATE
    warmup: float = 0.1
    held_out: float = 0.05
    patience: int = 2
    soft_targets: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises InvalidArgumentError naming what cannot be."""
        for field, right, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1 position"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "greater than 0"),
            ("warmup", 0 <= self.warmup <= 1, "a share, from 0 to 1"),
            ("held_out", 0 <= self.held_out < 1, "a share, from 0 to less than 1"),
            ("patience", self.patience >= 1, "at least 1 epoch"),
            ("seed", 0 <= self.seed < 1 << 32, "from 0 to 4294967295"),
        ):
            if not right:
                raise InvalidArgumentError(
                    f"{field} = {getattr(self, field)} must be {rule}", field=field
                )

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step, from 0 on."""
        warmup = max(1, int(self.warmup * num_steps))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
        return self.learning_rate * min((step + 1) / warmup, cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What an epoch ended in; number 0 is the start, before any step.

    train_loss_K: mean over its batches, as it went on; empty at the start. Held-out values are None
    without held-out prompts. held_loss_K: of the token that came, soft targets or not.
    held_tokens: tokens a step expected of the best tree of JUDGED_NODES nodes.
    """

    number: int
    train_loss_K: list[float]
    held_loss_K: list[float] | None = None
    held_top1_K: list[float] | None = None
    held_tokens: float | None = None

    @property
    def held_loss(self) -> float:
        """Of all heads together; of those that have any."""
        return sum(loss for loss in self.held_loss_K or () if math.isfinite(loss))

    @property
    def worth(self) -> tuple[float, float]:
        """Greater is better; among as many tokens a step the lesser loss decides."""
        return self.held_tokens or 0.0, -self.held_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """After a step. epoch: from 1. loss_K: mean of the epoch so far. last: the last epoch that
    ended. drift: as loss_K, of a LoRA that learns too: its distance from the base."""

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    loss_K: list[float]
    last: Epoch
    drift: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """heads: of epoch `best`, in float32 on the host. seconds: of all runs that it took."""

    heads: MedusaHeads
    history: list[Epoch]
    best: int
    num_positions: int
    seconds: float
