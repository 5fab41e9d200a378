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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError
from lorastack.train.checkpoint import (
    learning_tensors,
    load_checkpoint,
    restore_learning,
    save_checkpoint,
)
from lorastack.train.corpus import NO_TARGET, Corpus
from lorastack.train.folder import stored
from lorastack.train.heads import MedusaHeads
from lorastack.train.joint_options import Drift, Held, Joint, JointEpoch, JointOptions
from lorastack.train.lora import LoraModel
from lorastack.train.loss import drift_loss, hard_loss
from lorastack.train.measure import (
    expected_tokens,
    measure_states,
    rank_accuracies,
    search_choices,
)
from lorastack.train.options import Progress, Trained, TrainOptions
from lorastack.train.trainer import (
    BETAS,
    CHECKPOINT_SECONDS,
    JUDGED_NODES,
    check_training,
    identity_of,
)
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
        self._taught, self._held = corpus.split(options.held_out)
        if not self._taught:
            raise InvalidArgumentError(
                "the corpus has no answers to learn from: distil more prompts, or hold none out"
            )
        self._lora, self._corpus, self._output, self._rows_VH = lora, corpus, output, rows_VH
        self._options, self._joint, self._path = options, joint, path
        self._identity = identity_of(start, corpus, output, options) | {
            f"LoRA's {name}": value for name, value in asdict(joint).items()
        }
        self._heads = start.to(rows_VH.device, torch.float32)
        heads, adapters = self._heads.learnt(), lora.learnt()
        for tensor in heads.values():
            tensor.requires_grad_()
        self._learnt = {**heads, **adapters}
        groups = [{"params": list(each.values())} for each in (heads, adapters)]
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
        self._rates = (options.learning_rate, joint.learning_rate)
        num_tokens = len(corpus.positions(self._taught))
        batches = math.ceil(num_tokens / options.batch_size)
        self._num_positions, self._batches = num_tokens, min(batches, len(self._taught))
        self._steps = self._batches * options.epochs
        self._step, self._seconds, self._best = 0, 0.0, 0
        self._history: list[JointEpoch] = []
        self._best_weights: dict[str, Tensor] = {}
        # Of the epoch so far: the sums of the heads' losses and, last, of the drift; and how many
        # tokens they are of.
        self._sums = torch.zeros(start.num_heads + 1, dtype=torch.float64)
        self._counts = torch.zeros(start.num_heads + 1, dtype=torch.float64)

    def train(self, progress: Callable[[Progress], None]) -> Joint:
        begun, earlier = time.monotonic(), 0.0
        if self._resume():
            earlier = self._seconds
        else:
            self._end_epoch()
        saved = begun
        epoch, order = -1, list[Tensor]()
        while self._step < self._steps and not self._gave_up():
            if epoch != self._step // self._batches:
                epoch = self._step // self._batches
                order = self._order(epoch)
            self._train_batch(order[self._step % self._batches].tolist())
            self._step += 1
            now = time.monotonic()
            self._seconds = earlier + now - begun
            progress(self._progress(epoch))
            ended = self._step % self._batches == 0
            if ended:
                self._end_epoch()
            if ended or now - saved >= CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        return self._result()

    @torch.no_grad()
    def _result(self) -> Joint:
        for name, tensor in self._learnt.items():
            tensor.copy_(self._best_weights[name])
        self._lora.round()
        heads = stored(self._heads)
        trained = Trained(
            heads=heads,
            history=list(self._history),
            best=self._best,
            num_positions=self._num_positions,
            seconds=self._seconds,
        )
        on_device = heads.to(self._rows_VH.device, torch.float32)
        held = self._measure(on_device) if self._held else None
        return Joint(trained=trained, lora=self._lora, held=held)

    def _order(self, epoch: int) -> list[Tensor]:
        """The samples of each of an epoch's steps."""
        generator = torch.Generator().manual_seed((self._options.seed << 16) + epoch)
        order = torch.randperm(len(self._taught), generator=generator)
        return list(torch.tensor_split(torch.tensor(self._taught)[order], self._batches))

    # -- a step -----------------------------------------------------------------------------------

    def _train_batch(self, samples: Sequence[int]) -> None:
        num_positions = len(self._corpus.positions(samples))
        ramp = math.sin(math.pi / 2 * (self._step + 1) / self._steps)
        for sample in samples:
            self._learn(sample, self._joint.heads_weight * ramp, num_positions)
        if not bool(self._sums.isfinite().all()):
            raise InvalidArgumentError(
                f"the loss is not finite at step {self._step}: take lower learning rates",
                field="learning_rate",
            )
        share = self._options.rate(self._step, self._steps) / self._options.learning_rate
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _learn(self, sample: int, weight: float, num_positions: int) -> None:
        """Adds a sample's gradients of the batch's mean loss. num_positions: of the batch."""
        states_PH = self._states(sample)
        x_PH = states_PH.detach().to(self._rows_VH.dtype)
        drift, gradient_PH, _ = drift_loss(x_PH, self._base(sample), self._rows_VH)
        self._add(-1, drift, len(x_PH))
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
            self._add(head, loss, len(own_PH))
            torch.autograd.backward(r_PH, by_r_PH / num_positions)
            assert own_PH.grad is not None
            gradient_PH[valid_P] += weight * DECAY ** (head + 1) * own_PH.grad
        torch.autograd.backward(states_PH, gradient_PH.to(states_PH.dtype))

    def _add(self, at: int, loss: Tensor, count: int) -> None:
        self._sums[at] += float(loss)
        self._counts[at] += count

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

    def _means(self) -> list[float]:
        """Of the epoch so far: the heads' losses and, last, the drift."""
        return (self._sums / self._counts).tolist()

    def _end_epoch(self) -> None:
        """Judges the weights, and keeps them if there were no better ones."""
        ended = JointEpoch(number=self._step // self._batches, train_loss_K=[])
        if self._step:
            *loss_K, drift = self._means()
            ended = replace(ended, train_loss_K=loss_K, train_drift=drift)
        self._sums.zero_()
        self._counts.zero_()
        if self._held:
            held = self._measure(self._heads)
            ranks_PK, loss_K = held.measured.ranks_PK, held.measured.loss_K
            known = [(k, loss) for k, loss in enumerate(loss_K, start=1) if math.isfinite(loss)]
            weight = self._joint.heads_weight
            ended = replace(
                ended,
                held_loss_K=loss_K,
                held_top1_K=[row[0] for row in rank_accuracies(ranks_PK, 1)],
                held_tokens=expected_tokens(ranks_PK, search_choices(ranks_PK, JUDGED_NODES)),
                held_drift=held.drift.kl,
                held_same=held.drift.same,
                objective=held.drift.kl + weight * sum(DECAY**k * loss for k, loss in known),
            )
        better = not self._history or ended.worth > self._history[self._best].worth
        self._history.append(ended)
        if better or not self._held:
            self._best = ended.number
            self._best_weights = {name: t.detach().clone() for name, t in self._learnt.items()}

    def _gave_up(self) -> bool:
        return self._history[-1].number - self._best >= self._options.patience

    def _progress(self, epoch: int) -> Progress:
        means = self._means()
        return Progress(
            epoch=epoch + 1,
            num_epochs=self._options.epochs,
            step=self._step,
            num_steps=self._steps,
            loss_K=means[:-1],
            last=self._history[-1],
            seconds_left=None,
            drift=means[-1],
        )

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        if self._path is None:
            return
        tensors = learning_tensors(self._learnt, self._best_weights, self._optimizer)
        tensors |= {"loss.sums": self._sums, "loss.counts": self._counts}
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
        self._history = [JointEpoch(**epoch) for epoch in state["history"]]
        self._sums, self._counts = tensors["loss.sums"], tensors["loss.counts"]
        self._best_weights = restore_learning(tensors, self._learnt, self._optimizer)
        return True
