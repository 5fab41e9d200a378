"""Trains a LoRA and Medusa heads together: the LoRA makes the model's text easier to guess.

The LoRA learns from two sides (Medusa-2 with self-distillation): it shall say what the base says,
by KL(base || adapted) over all tokens, and its states shall let the heads guess right:

    loss = KL + weight * sin(pi / 2 * step / steps) * sum over heads k of 0.8^k * cross entropy k

The base's side is what it said itself when the corpus was made: its tokens and its states, without
any LoRA. Heads learn their own cross entropies, unweighted as in `train.trainer`. lm_head and the
base are frozen. Losses are those of answers' tokens alone, and each text runs by itself, without
padding. Gradients by the states are made by hand, a slice of the logits at a time.

A run is a function of its start, corpus, options and seed, as in `train.trainer`, on a CPU with as
many threads; other numbers of them, and GPUs, may round otherwise.

Shape suffixes: P positions of an answer, K heads, H hidden, V vocabulary, T tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from lorastack.train.corpus import NO_TARGET, Corpus
from lorastack.train.folder import stored
from lorastack.train.heads import MedusaHeads
from lorastack.train.joint_options import Drift, Held, Joint, JointEpoch, JointOptions
from lorastack.train.loop import BETAS, JUDGED_NODES, TrainingLoop
from lorastack.train.lora import LoraModel
from lorastack.train.loss import drift_loss, hard_loss
from lorastack.train.measure import (
    expected_tokens,
    measure_states,
    rank_accuracies,
    search_choices,
)
from lorastack.train.options import Progress, Trained, TrainOptions
from lorastack.train.trainer import check_training, identity_of, split_corpus
from lorastack.train.vocabulary import Output, output_of

DECAY = 0.8  # of the heads' weights, from one to the next


def train_joint(
    start: MedusaHeads,
    base: Path,
    corpus: Corpus,
    lm_head_VH: Tensor,
    ids_N: Tensor | None,
    options: TrainOptions,
    joint: JointOptions,
    *,
    checkpoint: Path | None = None,
    device: torch.device | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Joint:
    """Trains heads from `start`, which is left as it is, and a new LoRA.

    base: the base model's folder; it runs in float32 on a CPU, in lm_head's dtype elsewhere. The
    rest is as in `train_heads`; options.learning_rate is the heads'.
    """
    joint.check()
    device = device or torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else lm_head_VH.dtype
    lora = LoraModel(base, rank=joint.rank, seed=options.seed, device=device, dtype=dtype)
    whole = output_of(lm_head_VH, None, device=device, dtype=dtype)
    output = whole if ids_N is None else output_of(lm_head_VH, ids_N, device=device, dtype=dtype)
    run = _Run(start, lora, corpus, output, whole.rows_NH, options, joint, checkpoint)
    return run.train(progress)


class _Run:
    """output: what the heads choose from. rows_VH: the whole lm_head, where those rows are."""

    def __init__(
        self,
        start: MedusaHeads,
        lora: LoraModel,
        corpus: Corpus,
        output: Output,
        rows_VH: Tensor,
        options: TrainOptions,
        joint: JointOptions,
        path: Path | None,
    ) -> None:
        check_training(start, corpus, options)
        taught, self._held = split_corpus(corpus, options)
        self._lora, self._corpus, self._output, self._rows_VH = lora, corpus, output, rows_VH
        self._options, self._joint = options, joint
        self._heads = start.to(rows_VH.device, torch.float32)
        heads, adapters = self._heads.learnt(), lora.learnt()
        for tensor in heads.values():
            tensor.requires_grad_()
        groups = [{"params": list(each.values())} for each in (heads, adapters)]
        self._rates = (options.learning_rate, joint.learning_rate)
        self._num_positions = len(corpus.positions(taught))
        num_batches = math.ceil(self._num_positions / options.batch_size)
        self._loop = TrainingLoop(
            {**heads, **adapters},
            torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0),
            options,
            torch.tensor(taught),
            num_batches=min(num_batches, len(taught)),
            num_losses=start.num_heads + 1,  # the last is the drift
            identity=identity_of(start, corpus, output, options)
            | {f"LoRA's {name}": value for name, value in asdict(joint).items()},
            path=path,
            epoch=JointEpoch,
        )

    def train(self, progress: Callable[[Progress], None]) -> Joint:
        self._loop.run(
            self._train_batch,
            self._judge,
            lambda epoch: progress(self._progress(epoch)),
            judged=bool(self._held),
            last_gain=lambda: self._loop.best,
        )
        return self._result()

    @torch.no_grad()
    def _result(self) -> Joint:
        self._lora.round()
        heads = stored(self._heads)
        trained = Trained(
            heads=heads,
            history=list(self._loop.history),
            best=self._loop.best,
            num_positions=self._num_positions,
            seconds=self._loop.seconds,
        )
        on_device = heads.to(self._rows_VH.device, torch.float32)
        held = self._measure(on_device) if self._held else None
        return Joint(trained=trained, lora=self._lora, held=held)

    # -- a step -----------------------------------------------------------------------------------

    def _train_batch(self, samples: Tensor) -> None:
        picked, loop = samples.tolist(), self._loop
        num_positions = len(self._corpus.positions(picked))
        ramp = math.sin(math.pi / 2 * (loop.step + 1) / loop.num_steps)
        for sample in picked:
            self._learn(sample, self._joint.heads_weight * ramp, num_positions)
        share = self._options.rate(loop.step, loop.num_steps) / self._options.learning_rate
        loop.apply([rate * share for rate in self._rates], "take lower learning rates")

    def _learn(self, sample: int, weight: float, num_positions: int) -> None:
        """Adds a sample's gradients of the batch's mean loss. num_positions: of the batch."""
        states_PH = self._states(sample)
        x_PH = states_PH.detach().to(self._rows_VH.dtype)
        drift, gradient_PH, _ = drift_loss(x_PH, self._base(sample), self._rows_VH)
        self._loop.add(-1, drift, len(x_PH))
        gradient_PH /= num_positions
        targets_PK = self._corpus.targets(self._corpus.positions([sample]), self._heads.num_heads)
        for head in range(self._heads.num_heads):
            columns_P = self._output.columns(targets_PK[:, head].to(x_PH.device))
            valid_P = columns_P != NO_TARGET
            if not bool(valid_P.any()):
                continue
            own_PH = x_PH[valid_P].requires_grad_()
            r_PH = self._heads.state(own_PH, head)
            loss, by_r_PH = hard_loss(r_PH.detach(), self._output.rows_NH, columns_P[valid_P])
            self._loop.add(head, loss, len(own_PH))
            torch.autograd.backward(r_PH, by_r_PH / num_positions)
            assert own_PH.grad is not None
            gradient_PH[valid_P] += weight * DECAY ** (head + 1) * own_PH.grad
        torch.autograd.backward(states_PH, gradient_PH.to(states_PH.dtype))

    def _states(self, sample: int) -> Tensor:
        """[P, H]: the adapted model's states that predict the answer's tokens."""
        prompt_T, answer_T = self._corpus.prompt(sample), self._corpus.answers(sample)
        states_TH = self._lora.states(torch.cat([prompt_T, answer_T[:-1]]))
        return states_TH[len(prompt_T) - 1 :]

    def _base(self, sample: int) -> Tensor:
        """[P, H]: the base's own."""
        base_PH = self._corpus.hidden(self._corpus.positions([sample]))
        return base_PH.to(self._rows_VH.device, self._rows_VH.dtype)

    # -- an epoch ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self, heads: MedusaHeads) -> Held:
        """Of the held-out prompts, as the weights are now."""
        drift, same, lengths = 0.0, 0, list[int]()

        def states() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal drift, same
            for sample in self._held:
                positions_P = self._corpus.positions([sample])
                x_PH = self._states(sample).to(self._rows_VH.dtype)
                lost, _, alike = drift_loss(x_PH, self._base(sample), self._rows_VH)
                drift, same = drift + float(lost), same + int(alike)
                lengths.append(len(positions_P))
                yield x_PH, self._corpus.targets(positions_P, heads.num_heads)

        measured = measure_states(heads, states(), self._output)
        total = sum(lengths)
        return Held(
            measured=measured, lengths=lengths, drift=Drift(kl=drift / total, same=same / total)
        )

    def _judge(self, number: int, means: list[float]) -> JointEpoch:
        ended = JointEpoch(number=number, train_loss_K=means[:-1])
        if means:
            ended = replace(ended, train_drift=means[-1])
        if not self._held:
            return ended
        held = self._measure(self._heads)
        ranks_PK, loss_K = held.measured.ranks_PK, held.measured.loss_K
        known = [(k, loss) for k, loss in enumerate(loss_K, start=1) if math.isfinite(loss)]
        weight = self._joint.heads_weight
        return replace(
            ended,
            held_loss_K=loss_K,
            held_top1_K=[row[0] for row in rank_accuracies(ranks_PK, 1)],
            held_tokens=expected_tokens(ranks_PK, search_choices(ranks_PK, JUDGED_NODES)),
            held_drift=held.drift.kl,
            held_same=held.drift.same,
            objective=held.drift.kl + weight * sum(DECAY**k * loss for k, loss in known),
        )

    def _progress(self, epoch: int) -> Progress:
        *loss_K, drift = self._loop.means()
        return self._loop.progress(epoch, loss_K, drift)
