"""The loop that trainers share: epochs of batches, the best epoch's weights, and exact resume.

What a trainer learns from a batch and how it judges an epoch is its own.

Shape suffixes: I what an epoch goes through, L losses that are told apart, K heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorastack.errors import InvalidArgumentError
from lorastack.train.checkpoint import (
    learning_tensors,
    load_checkpoint,
    restore_learning,
    save_checkpoint,
)
from lorastack.train.options import Epoch, Progress, TrainOptions

BETAS = (0.9, 0.98)  # of Adam
JUDGED_NODES = 8  # of the static tree by which epochs are compared
CHECKPOINT_SECONDS = 60.0

EpochT = TypeVar("EpochT", bound=Epoch)


class TrainingLoop(Generic[EpochT]):
    """How far a run is. step: steps taken. seconds: of all runs that it took.

    sums_L, counts_L: of the epoch so far; the losses' sums, and of how many tokens they are.
    history: ended epochs; best: the number of the one whose weights are kept.
    """

    def __init__(
        self,
        learnt: Mapping[str, Tensor],
        optimizer: Optimizer,
        options: TrainOptions,
        items_I: Tensor,
        *,
        num_batches: int,
        num_losses: int,
        identity: Mapping[str, Any],
        path: Path | None,
        epoch: type[EpochT],
    ) -> None:
        """learnt: what the optimizer changes. items_I: cut into `num_batches`, in each epoch anew.

        identity, path: see `save_checkpoint`; None: no checkpoint is kept.
        """
        self.num_steps = num_batches * options.epochs
        self.step, self.seconds, self.best = 0, 0.0, 0
        self.history: list[EpochT] = []
        self.sums_L = torch.zeros(num_losses, dtype=torch.float64)
        self.counts_L = torch.zeros(num_losses, dtype=torch.float64)
        self._learnt, self._optimizer, self._options = learnt, optimizer, options
        self._items_I, self._num_batches = items_I, num_batches
        self._identity, self._path, self._epoch = identity, path, epoch
        self._best_weights: dict[str, Tensor] = {}

    def run(
        self,
        learn: Callable[[Tensor], None],
        judge: Callable[[int, list[float]], EpochT],
        report: Callable[[int], None],
        *,
        judged: bool,
        last_gain: Callable[[], int],
    ) -> None:
        """Trains to the end; the weights are the best epoch's then.

        learn: takes a batch and ends in `apply`. judge: an epoch by its number and mean losses,
        none at the start. judged: else each epoch is better than those before it. last_gain: the
        number of the last epoch that gained anything. report: after a step of this epoch, from 0.
        """
        begun, earlier = time.monotonic(), 0.0
        if self._resume():
            earlier = self.seconds
        else:
            self._end_epoch(judge, judged=judged)
        saved, at, batches = begun, -1, tuple[Tensor, ...]()
        while self.step < self.num_steps and not self._gave_up(last_gain()):
            epoch, batch = divmod(self.step, self._num_batches)
            if epoch != at:
                at, batches = epoch, self._batches_of(epoch)
            learn(batches[batch])
            self.step += 1
            now = time.monotonic()
            self.seconds = earlier + now - begun
            report(epoch)
            ended = batch + 1 == self._num_batches
            if ended:
                self._end_epoch(judge, judged=judged)
            if ended or now - saved >= CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        with torch.no_grad():
            for name, tensor in self._learnt.items():
                tensor.copy_(self._best_weights[name])

    def add(self, at: int, loss: Tensor, count: int) -> None:
        """Counts a loss's sum over `count` tokens."""
        self.sums_L[at] += float(loss)
        self.counts_L[at] += count

    def apply(self, rates: Sequence[float], remedy: str) -> None:
        """Changes the weights by their gradients. rates: learning rates of the optimizer's groups.

        Raises InvalidArgumentError with a remedy for a loss that is not finite.
        """
        if not bool(self.sums_L.isfinite().all()):
            raise InvalidArgumentError(
                f"the loss is not finite at step {self.step}: {remedy}", field="learning_rate"
            )
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def means(self) -> list[float]:
        """The mean losses of the epoch so far; none before the first step."""
        return (self.sums_L / self.counts_L).tolist() if self.step else []

    def progress(self, epoch: int, loss_K: list[float], drift: float | None = None) -> Progress:
        """After a step of an epoch, from 0."""
        return Progress(
            epoch=epoch + 1,
            num_epochs=self._options.epochs,
            step=self.step,
            num_steps=self.num_steps,
            loss_K=loss_K,
            last=self.history[-1],
            drift=drift,
        )

    def _batches_of(self, epoch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed((self._options.seed << 16) + epoch)
        order_I = torch.randperm(len(self._items_I), generator=generator)
        return torch.tensor_split(self._items_I[order_I], self._num_batches)

    def _end_epoch(self, judge: Callable[[int, list[float]], EpochT], *, judged: bool) -> None:
        """Judges the weights, and keeps them if there were no better ones."""
        means = self.means()
        self.sums_L.zero_()
        self.counts_L.zero_()
        ended = judge(self.step // self._num_batches, means)
        better = not self.history or ended.worth > self.history[self.best].worth
        self.history.append(ended)
        if better or not judged:
            self.best = ended.number
            self._best_weights = {name: t.detach().clone() for name, t in self._learnt.items()}

    def _gave_up(self, last_gain: int) -> bool:
        return self.history[-1].number - last_gain >= self._options.patience

    def _save(self) -> None:
        if self._path is None:
            return
        tensors = learning_tensors(self._learnt, self._best_weights, self._optimizer)
        tensors |= {"loss.sums": self.sums_L, "loss.counts": self.counts_L}
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "history": [asdict(epoch) for epoch in self.history],
        }
        save_checkpoint(self._path, self._identity, state, tensors)

    def _resume(self) -> bool:
        """True if there was a checkpoint."""
        found = None if self._path is None else load_checkpoint(self._path, self._identity)
        if found is None:
            return False
        state, tensors = found
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.history = [self._epoch(**epoch) for epoch in state["history"]]
        self.sums_L, self.counts_L = tensors["loss.sums"], tensors["loss.counts"]
        self._best_weights = restore_learning(tensors, self._learnt, self._optimizer)
        return True
