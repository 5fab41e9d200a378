"""Trains Medusa heads, or a private part of theirs, on a corpus; the base and lm_head are frozen.

Recipe: Medusa's v2 trainer (sum of the heads' cross entropies, AdamW without weight decay, learning
rate 1e-3, cosine with warm-up). Weights are float32, losses too. No two heads share a weight, and
Adam's step does not change when a gradient is scaled: losses weighted by head would train the same.

A run is a function of its start, its corpus and its options: batches follow from seed and epoch.
So an interrupted run that goes on from its checkpoint ends in the same bits. Torch's matmuls may
round otherwise on another processor; nothing else depends on the number of threads, and on a
processor with AVX2 one thread and four gave the same bits there too.

An epoch is as good as the tokens a step that its heads are expected to give on held-out prompts,
with their best static tree: that is what they are for, while the loss also counts how sure they
are, which serving learns by itself. The best epoch's weights are the result.

Shape suffixes: P positions of a batch, K heads, H hidden, J tokens kept of the base's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native.isa import usable
from lorastack.train.checkpoint import (
    digest,
    learning_tensors,
    load_checkpoint,
    restore_learning,
    save_checkpoint,
)
from lorastack.train.corpus import NO_TARGET, Corpus
from lorastack.train.heads import MedusaHeads
from lorastack.train.loss import SoftTargets, hard_loss, soft_loss
from lorastack.train.measure import expected_tokens, measure_heads, rank_accuracies, search_choices
from lorastack.train.options import Epoch, Progress, Trained, TrainOptions
from lorastack.train.vocabulary import Output, output_of

__all__ = [
    "Epoch",
    "Progress",
    "TrainOptions",
    "Trained",
    "check_training",
    "identity_of",
    "matmul_dtype",
    "train_heads",
]

BETAS = (0.9, 0.98)
JUDGED_NODES = 8  # of the static tree by which epochs are compared
CHECKPOINT_SECONDS = 60.0


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The faster one: bfloat16 where the processor multiplies it, float32 elsewhere."""
    if device.type != "cpu" or any(isa.multiplies_pairs for isa in usable(torch.bfloat16)):
        return torch.bfloat16
    return torch.float32


def train_heads(
    start: MedusaHeads,
    corpus: Corpus,
    lm_head_VH: Tensor,
    ids_N: Tensor | None,
    options: TrainOptions,
    *,
    checkpoint: Path | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Trains what `start.learnt()` names; `start` itself is left as it is.

    lm_head_VH: see `output_of`. ids_N: tokens that the heads choose from, rising; None for all.
    checkpoint: a file to go on from, if it is there, and to keep. device: None for the CPU. dtype:
    of matmuls; None for `matmul_dtype`. Raises InvalidArgumentError for a corpus that does not
    serve, and what `load_checkpoint` and `save_checkpoint` raise.
    """
    device = device or torch.device("cpu")
    output = output_of(lm_head_VH, ids_N, device=device, dtype=dtype or matmul_dtype(device))
    return _Run(start, corpus, output, options, checkpoint).train(progress)


class _Run:
    def __init__(
        self,
        start: MedusaHeads,
        corpus: Corpus,
        output: Output,
        options: TrainOptions,
        path: Path | None,
    ) -> None:
        check_training(start, corpus, options)
        taught, held = corpus.split(options.held_out)
        self._taught_P, self._held_P = corpus.positions(taught), corpus.positions(held)
        if not len(self._taught_P):
            raise InvalidArgumentError(
                "the corpus has no answers to learn from: distil more prompts, or hold none out"
            )
        self._corpus, self._output, self._options, self._path = corpus, output, options, path
        self._identity = identity_of(start, corpus, output, options)
        self._device = output.rows_NH.device
        self._heads = start.to(self._device, torch.float32)
        self._learnt = self._heads.learnt()
        for tensor in self._learnt.values():
            tensor.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            self._learnt.values(), lr=options.learning_rate, betas=BETAS, weight_decay=0.0
        )
        self._batches = math.ceil(len(self._taught_P) / options.batch_size)
        self._steps = self._batches * options.epochs
        self._step, self._seconds, self._best = 0, 0.0, 0
        self._evaluating = 0.0  # seconds that the last evaluation took
        self._history: list[Epoch] = []
        self._best_weights: dict[str, Tensor] = {}
        # Of the epoch so far, by head: the sums of the losses, and how many they are of.
        self._sums_K = torch.zeros(start.num_heads, dtype=torch.float64)
        self._counts_K = torch.zeros(start.num_heads, dtype=torch.float64)

    def train(self, progress: Callable[[Progress], None]) -> Trained:
        begun, earlier = time.monotonic(), 0.0
        if self._resume():
            earlier = self._seconds
        else:
            self._end_epoch()
        saved, first, worked = begun, self._step, 0.0
        epoch, order_P = -1, self._taught_P
        while self._step < self._steps and not self._gave_up():
            if epoch != self._step // self._batches:
                epoch = self._step // self._batches
                order_P = self._order(epoch)
            batch = self._step % self._batches
            started = time.monotonic()
            self._train_batch(torch.tensor_split(order_P, self._batches)[batch])
            self._step += 1
            now = time.monotonic()
            worked, self._seconds = worked + now - started, earlier + now - begun
            progress(self._progress(epoch, worked / (self._step - first)))
            if batch + 1 == self._batches:
                self._end_epoch()
            if batch + 1 == self._batches or now - saved >= CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        with torch.no_grad():
            for name, tensor in self._learnt.items():
                tensor.copy_(self._best_weights[name])
        return Trained(
            heads=self._heads.to_host(),
            history=self._history,
            best=self._best,
            num_positions=len(self._taught_P),
            seconds=self._seconds,
        )

    def _order(self, epoch: int) -> Tensor:
        """The positions of an epoch, [P], in the order of its steps."""
        generator = torch.Generator().manual_seed((self._options.seed << 16) + epoch)
        return self._taught_P[torch.randperm(len(self._taught_P), generator=generator)]

    def _train_batch(self, positions_P: Tensor) -> None:
        positions_P = positions_P.sort().values  # their states are read in the order of the disk
        rows_NH, num_heads = self._output.rows_NH, self._heads.num_heads
        x_PH = self._corpus.hidden(positions_P).to(self._device, rows_NH.dtype)
        targets_PK = self._corpus.targets(positions_P, num_heads)
        for head in range(num_heads):
            self._learn(head, x_PH, positions_P, targets_PK[:, head])
        if not bool(self._sums_K.isfinite().all()):
            raise InvalidArgumentError(
                f"the loss is not finite at step {self._step}: take a lower learning rate",
                field="learning_rate",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate(self._step, self._steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _learn(self, head: int, x_PH: Tensor, positions_P: Tensor, targets_P: Tensor) -> None:
        """Adds one head's gradients of the batch's mean loss."""
        columns_P = self._output.columns(targets_P.to(self._device))
        soft = self._options.soft_targets
        valid_P = (targets_P if soft else columns_P.cpu()) != NO_TARGET
        count = int(valid_P.sum())
        if not count:
            return
        r_PH = self._heads.state(x_PH[valid_P.to(self._device)], head)
        if soft:
            wanted = self._soft_targets(positions_P[valid_P] + head + 1)
            loss, gradient_PH = soft_loss(r_PH.detach(), self._output.rows_NH, wanted)
        else:
            columns_P = columns_P[valid_P.to(self._device)]
            loss, gradient_PH = hard_loss(r_PH.detach(), self._output.rows_NH, columns_P)
        torch.autograd.backward(r_PH, gradient_PH / count)
        self._sums_K[head] += float(loss)
        self._counts_K[head] += count

    def _soft_targets(self, positions_P: Tensor) -> SoftTargets:
        ids_PJ, logprobs_PJ = self._corpus.top(positions_P)
        probs_PJ = logprobs_PJ.to(self._device).exp()
        columns_PJ = self._output.columns(ids_PJ.to(self._device))
        rest_P = (1 - probs_PJ.sum(-1)).clamp_min(0.0)
        probs_PJ = probs_PJ.masked_fill(columns_PJ == NO_TARGET, 0.0)
        return SoftTargets(columns_PJ.clamp(min=0), probs_PJ, rest_P)

    def _loss_K(self) -> list[float]:
        return (self._sums_K / self._counts_K).tolist() if self._step else []

    def _end_epoch(self) -> None:
        """Judges the weights, and keeps them if there were no better ones."""
        begun, number, loss_K = time.monotonic(), self._step // self._batches, self._loss_K()
        self._sums_K.zero_()
        self._counts_K.zero_()
        if not len(self._held_P):
            self._history.append(Epoch(number=number, train_loss_K=loss_K))
            better = True
        else:
            measured = measure_heads(self._heads, self._corpus, self._held_P, self._output)
            choices = search_choices(measured.ranks_PK, JUDGED_NODES)
            ended = Epoch(
                number=number,
                train_loss_K=loss_K,
                held_loss_K=measured.loss_K,
                held_top1_K=[row[0] for row in rank_accuracies(measured.ranks_PK, 1)],
                held_tokens=expected_tokens(measured.ranks_PK, choices),
            )
            better = not self._history or ended.worth > self._history[self._best].worth
            self._history.append(ended)
        if better:
            self._best = number
            self._best_weights = {name: t.detach().clone() for name, t in self._learnt.items()}
        self._evaluating = time.monotonic() - begun

    def _gave_up(self) -> bool:
        """Few held-out prompts tell little of tokens a step: a loss that still falls counts too."""
        last_gain = max(self._best, min(self._history, key=lambda epoch: epoch.held_loss).number)
        return self._history[-1].number - last_gain >= self._options.patience

    def _progress(self, epoch: int, seconds_a_step: float) -> Progress:
        """epoch: from 0."""
        seconds_left = seconds_a_step * (self._steps - self._step)
        seconds_left += self._evaluating * (self._options.epochs - epoch)
        return Progress(
            epoch=epoch + 1,
            num_epochs=self._options.epochs,
            step=self._step,
            num_steps=self._steps,
            loss_K=self._loss_K(),
            last=self._history[-1],
            seconds_left=seconds_left,
        )

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        if self._path is None:
            return
        tensors = learning_tensors(self._learnt, self._best_weights, self._optimizer)
        tensors |= {"loss.sums": self._sums_K, "loss.counts": self._counts_K}
        state = {
            "step": self._step,
            "seconds": self._seconds,
            "best": self._best,
            "history": [asdict(epoch) for epoch in self._history],
        }
        save_checkpoint(self._path, self._identity, state, tensors)

    def _resume(self) -> bool:
        """True if there was a checkpoint."""
        found = None if self._path is None else load_checkpoint(self._path, self._identity)
        if found is None:
            return False
        state, tensors = found
        self._step, self._seconds, self._best = state["step"], state["seconds"], state["best"]
        self._history = [Epoch(**epoch) for epoch in state["history"]]
        self._sums_K, self._counts_K = tensors["loss.sums"], tensors["loss.counts"]
        self._best_weights = restore_learning(tensors, self._learnt, self._optimizer)
        return True


def check_training(start: MedusaHeads, corpus: Corpus, options: TrainOptions) -> None:
    """Raises InvalidArgumentError for options, or heads and a corpus, that do not serve."""
    options.check()
    if start.outputs:
        raise InvalidArgumentError(
            "version 1 heads, with output matrices of their own, are not trained: start from "
            "version 2 heads, or from none"
        )
    if start.hidden_size != corpus.hidden_size:
        raise InvalidArgumentError(
            f"the heads are made for states of {start.hidden_size} numbers, but the corpus has "
            f"some of {corpus.hidden_size}: take heads of the same base model"
        )
    if options.soft_targets and not corpus.num_top:
        raise InvalidArgumentError(
            "the corpus does not have the base's likeliest tokens, which soft targets are: distil "
            "it anew with them"
        )


def identity_of(
    start: MedusaHeads, corpus: Corpus, output: Output, options: TrainOptions
) -> dict[str, Any]:
    """What decides over every bit of the result, as far as a file can say."""
    ends_P = torch.arange(corpus.num_tokens)[[0, -1]]
    tokens = (corpus.tokens(torch.arange(corpus.num_tokens)), corpus.starts, corpus.hidden(ends_P))
    ids = () if output.ids_N is None else (output.ids_N,)
    blocks = [
        tensor
        for head in start.heads
        for block in head
        for tensor in (block.weight_HH, block.bias_H)
    ]
    return {
        **asdict(options),
        "heads to start from": digest([*blocks, *start.learnt().values()]),
        "corpus": digest(tokens),
        "draft vocabulary": digest(ids),
        "lm_head": digest([output.rows_NH[:64]]),
        "device and dtype": f"{output.rows_NH.device.type} {output.rows_NH.dtype}",
    }
