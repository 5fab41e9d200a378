"""Heads learn what can be learnt, and a run is a function of its start, corpus and options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.train import loop, measure
from lorastack.train.corpus import Corpus
from lorastack.train.heads import MedusaHeads, identity_heads, with_private
from lorastack.train.measure import measure_heads, rank_accuracies
from lorastack.train.options import Progress, Trained, TrainOptions
from lorastack.train.trainer import train_heads
from lorastack.train.vocabulary import output_of
from tests.train.corpora import HIDDEN, corpus_of, counting_corpus, lm_head

QUICK = TrainOptions(epochs=40, batch_size=64, learning_rate=1e-2, held_out=0.1, patience=40)
SHORT = TrainOptions(epochs=3, batch_size=40, learning_rate=1e-2, held_out=0.2, patience=40)


class Killed(Exception):
    """What ends a run early."""


def train(
    corpus: Corpus,
    start: MedusaHeads,
    options: TrainOptions,
    ids_N: Tensor | None = None,
    **more: Any,
) -> Trained:
    return train_heads(start, corpus, lm_head(), ids_N, options, dtype=torch.float32, **more)


def top1(heads: MedusaHeads, corpus: Corpus) -> list[float]:
    output = output_of(lm_head(), None, device=torch.device("cpu"), dtype=torch.float32)
    positions_P = torch.arange(corpus.num_tokens)
    ranks_PK = measure_heads(heads, corpus, positions_P, output).ranks_PK
    return [row[0] for row in rank_accuracies(ranks_PK, 1)]


def assert_same(one: Trained, other: Trained) -> None:
    left, right = one.heads.learnt(), other.heads.learnt()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert one.history == other.history and one.best == other.best


@pytest.mark.parametrize("num_layers", [1, 2])
def test_heads_learn_a_counting_text(tmp_path: Path, num_layers: int) -> None:
    corpus = counting_corpus(tmp_path)
    start = identity_heads(3, num_layers, HIDDEN)
    trained = train(corpus, start, QUICK)
    assert max(top1(start, corpus)) < 0.5
    assert min(top1(trained.heads, corpus)) > 0.99
    assert trained.history[-1].train_loss_K[0] < 0.1 < trained.history[1].train_loss_K[0]
    assert (trained.history[0].held_tokens or 0) < 1.5 < (trained.history[-1].held_tokens or 0)


def test_heads_learn_with_matmuls_in_bfloat16(tmp_path: Path) -> None:
    corpus, start = counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN)
    trained = train_heads(start, corpus, lm_head(), None, QUICK, dtype=torch.bfloat16)
    assert min(top1(trained.heads, corpus)) > 0.99
    assert {tensor.dtype for tensor in trained.heads.learnt().values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_trains_the_same_heads(tmp_path: Path) -> None:
    corpus, start = counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN)
    here = train(corpus, start, SHORT)
    path, device = tmp_path / "checkpoint.safetensors", torch.device("cuda")
    there = train(corpus, start, SHORT, device=device, checkpoint=path)
    for name, tensor in here.heads.learnt().items():
        torch.testing.assert_close(there.heads.learnt()[name], tensor, rtol=1e-2, atol=1e-3)
    assert_same(there, train(corpus, start, SHORT, device=device, checkpoint=path, progress=fails))


def test_states_are_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, read, sizes = counting_corpus(tmp_path), Corpus.hidden, []

    def counted(self: Corpus, positions_P: Tensor) -> Tensor:
        sizes.append(len(positions_P))
        return read(self, positions_P)

    monkeypatch.setattr(Corpus, "hidden", counted)
    monkeypatch.setattr(measure, "_BATCH", 32)
    train(corpus, identity_heads(1, 1, HIDDEN), SHORT)
    assert max(sizes) <= SHORT.batch_size < corpus.num_tokens


def test_only_the_heads_learn(tmp_path: Path) -> None:
    corpus, start = counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN)
    train(corpus, start, SHORT)
    assert not any(bool(tensor.any()) for tensor in start.learnt().values())
    assert top1(start, corpus) == top1(identity_heads(2, 1, HIDDEN), corpus)


def test_a_private_part_learns_and_the_shared_heads_stay(tmp_path: Path) -> None:
    """Shared heads that know one text learn another one by A and B alone."""
    corpus = counting_corpus(tmp_path, period=7)
    shared = train(corpus, identity_heads(2, 1, HIDDEN), QUICK).heads
    other = counting_corpus(tmp_path, period=11)
    start = with_private(shared, rank=16, seed=5)
    assert top1(start, other) == top1(shared, other)
    trained = train(other, start, QUICK).heads
    assert max(top1(start, other)) < 0.9 and min(top1(trained, other)) > 0.99
    assert set(trained.learnt()) == {
        f"{head}.0.linear.lora_{side}.weight" for head in range(2) for side in "AB"
    }
    for (old,), (new,) in zip(shared.heads, trained.heads, strict=True):
        assert torch.equal(old.weight_HH, new.weight_HH) and torch.equal(old.bias_H, new.bias_H)


def test_targets_outside_the_draft_vocabulary_teach_nothing(tmp_path: Path) -> None:
    """Text of two kinds; the heads may choose from one kind's tokens alone."""
    lm_head_VH = lm_head()
    kinds = [[10 + i % 5 for i in range(-1, 30)], [i % 3 for i in range(-1, 30)]]
    answers = [kind[1:] for kind in kinds] * 4
    states = [lm_head_VH[kind[:-1]] for kind in kinds] * 4
    corpus = corpus_of(tmp_path, answers, states)
    ids_N = torch.tensor([0, 1, 2, *range(20, 90)])
    options = replace(QUICK, held_out=0.0)
    trained = train(corpus, identity_heads(1, 1, HIDDEN), options, ids_N)
    output = output_of(lm_head_VH, ids_N, device=torch.device("cpu"), dtype=torch.float32)
    ranks_P = measure_heads(trained.heads, corpus, torch.arange(60), output).ranks_PK[:, 0]
    assert set(ranks_P[:29].tolist()) == {len(ids_N)}  # no place
    assert set(ranks_P[30:59].tolist()) == {0}
    nothing = train(corpus, identity_heads(1, 1, HIDDEN), SHORT, torch.arange(30, 94))
    assert not any(bool(tensor.any()) for tensor in nothing.heads.learnt().values())


def test_soft_targets_teach_the_distribution(tmp_path: Path) -> None:
    """The token that came is noise; the model held two others likely, 3 to 1."""
    lm_head_VH = lm_head()
    answers = [[50 + (7 * i + start) % 40 for i in range(20)] for start in range(6)]
    states = [lm_head_VH[[0] * 20] for _ in answers]
    ids = torch.tensor([[3, 4]]).expand(20, 2)
    logprobs = torch.tensor([[0.72, 0.24]]).log().expand(20, 2)
    corpus = corpus_of(tmp_path, answers, states, [(ids, logprobs)] * len(answers))
    options = TrainOptions(
        epochs=200, batch_size=60, learning_rate=1e-2, held_out=0, soft_targets=True
    )
    heads = train(corpus, identity_heads(1, 1, HIDDEN), options).heads
    probs_V = torch.softmax(heads.state(states[0][:1], 0) @ lm_head_VH.T, -1)[0]
    assert float(probs_V[3]) == pytest.approx(0.72, abs=0.02)
    assert float(probs_V[4]) == pytest.approx(0.24, abs=0.02)


def test_the_same_seed_and_data_give_the_same_bits(tmp_path: Path) -> None:
    corpus, start = counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN)
    assert_same(train(corpus, start, SHORT), train(corpus, start, SHORT))
    other = replace(SHORT, seed=1)
    name = "0.0.linear.weight"
    one, two = (train(corpus, start, options).heads.learnt() for options in (SHORT, other))
    assert not torch.equal(one[name], two[name])


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("last", [1, 4, 6, 11])
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, private: bool
) -> None:
    """Killed after a step in the middle of an epoch, at its end, after the last step."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    corpus, start = counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN)
    if private:
        start = with_private(start, rank=4, seed=0)
    whole = train(corpus, start, SHORT)
    assert whole.history[-1].number == 3 and corpus.num_tokens == 210

    def killing(progress: Progress) -> None:
        if progress.step == last + 1:
            raise Killed

    path = tmp_path / "work" / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train(corpus, start, SHORT, checkpoint=path, progress=killing)
    assert path.exists()
    steps: list[int] = []
    resumed = train(
        corpus, start, SHORT, checkpoint=path, progress=lambda progress: steps.append(progress.step)
    )
    assert_same(whole, resumed)
    assert steps[0] == last + 1 and steps[-1] == 12
    assert_same(whole, train(corpus, start, SHORT, checkpoint=path, progress=fails))


def fails(progress: Progress) -> None:
    pytest.fail("a run that is done takes no step")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    corpus, start = counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN)
    path = tmp_path / "checkpoint.safetensors"
    train(corpus, start, SHORT, checkpoint=path)
    for options, heads, ids_N, named in (
        (replace(SHORT, seed=2), start, None, "seed"),
        (SHORT, identity_heads(1, 1, HIDDEN), None, "heads to start from"),
        (SHORT, start, torch.arange(80), "draft vocabulary"),
    ):
        with pytest.raises(FailedPreconditionError, match=named):
            train(corpus, heads, options, ids_N, checkpoint=path)
    with pytest.raises(FailedPreconditionError, match="corpus"):
        train(counting_corpus(tmp_path, period=5), start, SHORT, checkpoint=path)


def test_training_ends_when_held_out_prompts_gain_nothing(tmp_path: Path) -> None:
    """Held-out text says other tokens at the same states: learning makes it less likely."""
    lm_head_VH = lm_head()
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(25, HIDDEN, generator=generator) * 0.05] * 8
    answers = [[i + (50 if sample < 3 else 0) for i in range(25)] for sample in range(8)]
    corpus = corpus_of(tmp_path, answers, states)
    options = TrainOptions(epochs=30, batch_size=64, learning_rate=1e-2, held_out=0.3, patience=3)
    trained = train_heads(
        identity_heads(1, 1, HIDDEN), corpus, lm_head_VH, None, options, dtype=torch.float32
    )
    held = [epoch.held_tokens or 0.0 for epoch in trained.history]
    losses = [sum(epoch.held_loss_K or ()) for epoch in trained.history]
    assert held[trained.best] == max(held)
    last_gain = max(trained.best, losses.index(min(losses)))
    assert trained.history[-1].number == last_gain + 3 < 30


def test_without_held_out_prompts_the_last_epoch_counts(tmp_path: Path) -> None:
    corpus = counting_corpus(tmp_path)
    options = replace(SHORT, held_out=0.0)
    trained = train(corpus, identity_heads(1, 1, HIDDEN), options)
    assert trained.best == 3 and trained.num_positions == corpus.num_tokens
    assert all(epoch.held_tokens is None for epoch in trained.history)


def test_progress_tells_how_far_it_is(tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(counting_corpus(tmp_path), identity_heads(2, 1, HIDDEN), SHORT, progress=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert [progress.epoch for progress in seen] == [1] * 4 + [2] * 4 + [3] * 4
    assert [progress.last.number for progress in seen[3:6]] == [0, 1, 1]
    assert all(len(progress.loss_K) == 2 for progress in seen)


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (identity_heads(1, 1, HIDDEN + 8), SHORT, "the same base model"),
        (MedusaHeads(identity_heads(1, 1, HIDDEN).heads, (lm_head(),)), SHORT, "version 1"),
        (identity_heads(1, 1, HIDDEN), TrainOptions(soft_targets=True), "soft targets"),
        (identity_heads(1, 1, HIDDEN), TrainOptions(epochs=0), "epochs = 0 must be"),
        (identity_heads(1, 1, HIDDEN), TrainOptions(held_out=1.0), "held_out = 1.0 must be"),
        (identity_heads(1, 1, HIDDEN), TrainOptions(learning_rate=-1.0), "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, start: MedusaHeads, options: TrainOptions, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        train(counting_corpus(tmp_path), start, options)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    lm_head_VH = lm_head()
    corpus = corpus_of(tmp_path, [[1, 2, 3]] * 3, [lm_head_VH[:3] * torch.inf] * 3)
    options = replace(SHORT, held_out=0.0)
    with pytest.raises(InvalidArgumentError, match="not finite at step 0"):
        train(corpus, identity_heads(1, 1, HIDDEN), options)
