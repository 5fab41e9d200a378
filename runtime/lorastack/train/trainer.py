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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native.isa import usable
from lorastack.train.checkpoint import digest
from lorastack.train.corpus import NO_TARGET, Corpus
from lorastack.train.heads import MedusaHeads
from lorastack.train.loop import BETAS, JUDGED_NODES, TrainingLoop
from lorastack.train.loss import SoftTargets, hard_loss, soft_loss
from lorastack.train.measure import expected_tokens, measure_heads, rank_accuracies, search_choices
from lorastack.train.options import Epoch, Progress, Trained, TrainOptions
from lorastack.train.vocabulary import Output, output_of


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
        taught_P, self._held_P = map(corpus.positions, split_corpus(corpus, options))
        self._corpus, self._output, self._options = corpus, output, options
        self._device = output.rows_NH.device
        self._heads = start.to(self._device, torch.float32)
        learnt = self._heads.learnt()
        for tensor in learnt.values():
            tensor.requires_grad_()
        self._num_positions = len(taught_P)
        self._loop = TrainingLoop(
            learnt,
            torch.optim.AdamW(learnt.values(), betas=BETAS, weight_decay=0.0),
            options,
            taught_P,
            num_batches=math.ceil(len(taught_P) / options.batch_size),
            num_losses=start.num_heads,
            identity=identity_of(start, corpus, output, options),
            path=path,
            epoch=Epoch,
        )

    def train(self, progress: Callable[[Progress], None]) -> Trained:
        loop = self._loop
        loop.run(
            self._train_batch,
            self._judge,
            lambda epoch: progress(loop.progress(epoch, loop.means())),
            judged=len(self._held_P) > 0,
            last_gain=self._last_gain,
        )
        return Trained(
            heads=self._heads.to_host(),
            history=loop.history,
            best=loop.best,
            num_positions=self._num_positions,
            seconds=loop.seconds,
        )

    def _train_batch(self, positions_P: Tensor) -> None:
        positions_P = positions_P.sort().values  # their states are read in the order of the disk
        rows_NH, num_heads = self._output.rows_NH, self._heads.num_heads
        x_PH = self._corpus.hidden(positions_P).to(self._device, rows_NH.dtype)
        targets_PK = self._corpus.targets(positions_P, num_heads)
        for head in range(num_heads):
            self._learn(head, x_PH, positions_P, targets_PK[:, head])
        rate = self._options.rate(self._loop.step, self._loop.num_steps)
        self._loop.apply([rate], "take a lower learning rate")

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
        self._loop.add(head, loss, count)

    def _soft_targets(self, positions_P: Tensor) -> SoftTargets:
        ids_PJ, logprobs_PJ = self._corpus.top(positions_P)
        probs_PJ = logprobs_PJ.to(self._device).exp()
        columns_PJ = self._output.columns(ids_PJ.to(self._device))
        rest_P = (1 - probs_PJ.sum(-1)).clamp_min(0.0)
        probs_PJ = probs_PJ.masked_fill(columns_PJ == NO_TARGET, 0.0)
        return SoftTargets(columns_PJ.clamp(min=0), probs_PJ, rest_P)

    def _judge(self, number: int, loss_K: list[float]) -> Epoch:
        if not len(self._held_P):
            return Epoch(number=number, train_loss_K=loss_K)
        measured = measure_heads(self._heads, self._corpus, self._held_P, self._output)
        choices = search_choices(measured.ranks_PK, JUDGED_NODES)
        return Epoch(
            number=number,
            train_loss_K=loss_K,
            held_loss_K=measured.loss_K,
            held_top1_K=[row[0] for row in rank_accuracies(measured.ranks_PK, 1)],
            held_tokens=expected_tokens(measured.ranks_PK, choices),
        )

    def _last_gain(self) -> int:
        """Few held-out prompts tell little of tokens a step: a loss that still falls counts too."""
        history = self._loop.history
        return max(self._loop.best, min(history, key=lambda epoch: epoch.held_loss).number)


def split_corpus(corpus: Corpus, options: TrainOptions) -> tuple[list[int], list[int]]:
    """Samples to learn from, and held-out ones. Raises InvalidArgumentError without the former."""
    taught, held = corpus.split(options.held_out)
    if not len(corpus.positions(taught)):
        raise InvalidArgumentError(
            "the corpus has no answers to learn from: distil more prompts, or hold none out"
        )
    return taught, held


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
