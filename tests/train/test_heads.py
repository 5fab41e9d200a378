"""Heads start as the identity, learn what can be learnt, and survive their folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorastack.train.heads import (
    MedusaHeads,
    TrainOptions,
    load_heads,
    loss_and_gradient,
    save_heads,
    train_heads,
)
from lorastack.train.hidden import NO_TARGET, HiddenCorpus, targets_of
from lorastack.train.measure import rank_accuracies, target_ranks

VOCAB, HIDDEN = 23, 32


def counting_corpus(num_heads: int) -> tuple[HiddenCorpus, Tensor]:
    """Text that counts 0, 1, ..., 6, 0, ...; the state at a token is that token's own vector."""
    torch.manual_seed(0)
    lm_head_VH = torch.nn.functional.normalize(torch.randn(VOCAB, HIDDEN), dim=-1) * 4
    answers = [[(start + i) % 7 for i in range(30)] for start in range(7)]
    hidden = [lm_head_VH[[(answer[0] - 1) % 7, *answer[:-1]]] for answer in answers]
    targets = [targets_of(answer, num_heads) for answer in answers]
    return HiddenCorpus(
        torch.cat(hidden), torch.cat(targets), [30 * i for i in range(len(answers) + 1)]
    ), lm_head_VH


def test_identity_at_the_start() -> None:
    heads = MedusaHeads(3, HIDDEN)
    x_PH = torch.randn(5, HIDDEN)
    for head in range(3):
        assert torch.equal(heads(x_PH, head), x_PH)


def test_a_head_is_the_published_block() -> None:
    torch.manual_seed(1)
    heads = MedusaHeads(2, HIDDEN)
    torch.nn.init.normal_(heads.weight_KHH)
    torch.nn.init.normal_(heads.bias_KH)
    x_PH = torch.randn(5, HIDDEN)
    z_PH = x_PH @ heads.weight_KHH[1].T + heads.bias_KH[1]
    torch.testing.assert_close(heads(x_PH, 1), x_PH + z_PH * torch.sigmoid(z_PH))


def test_heads_learn_a_counting_text() -> None:
    corpus, lm_head_VH = counting_corpus(3)
    heads = MedusaHeads(3, HIDDEN)
    before = rank_accuracies(target_ranks(heads, corpus, lm_head_VH), 1)
    options = TrainOptions(epochs=40, batch_size=64, learning_rate=1e-2, num_negatives=4)
    train_heads(heads, corpus, lm_head_VH, options)
    after = rank_accuracies(target_ranks(heads, corpus, lm_head_VH), 1)
    assert max(row[0] for row in before) < 0.5
    assert min(row[0] for row in after) > 0.99


def test_rare_tokens_are_not_taught() -> None:
    """Three of seven tokens are taught: guesses of those get right, no guess of another does."""
    corpus, lm_head_VH = counting_corpus(1)
    heads = MedusaHeads(1, HIDDEN)
    options = TrainOptions(
        epochs=40, batch_size=64, learning_rate=1e-2, max_targets=3, num_negatives=4
    )
    train_heads(heads, corpus, lm_head_VH, options)
    right_T = target_ranks(heads, corpus, lm_head_VH)[:, 0] == 0
    counts = corpus.targets_TK[corpus.targets_TK != NO_TARGET].bincount(minlength=VOCAB)
    taught_T = torch.isin(corpus.targets_TK[:, 0], counts.argsort(descending=True)[:3])
    assert right_T[taught_T].all()
    assert right_T[~taught_T].float().mean() < 0.5


def test_only_the_heads_learn() -> None:
    corpus, lm_head_VH = counting_corpus(2)
    frozen, states = lm_head_VH.clone(), corpus.hidden_TH.clone()
    train_heads(MedusaHeads(2, HIDDEN), corpus, lm_head_VH, TrainOptions(epochs=1))
    assert torch.equal(lm_head_VH, frozen)
    assert torch.equal(corpus.hidden_TH, states)


def test_loss_and_gradient_match_autograd() -> None:
    torch.manual_seed(2)
    r_PH = torch.randn(6, HIDDEN, requires_grad=True)
    rows_SH, correction_S = torch.randn(9, HIDDEN), torch.randn(9)
    columns_P = torch.randint(9, (6,))
    wanted = torch.nn.functional.cross_entropy(r_PH @ rows_SH.T + correction_S, columns_P)
    wanted.backward()
    loss, gradient_PH = loss_and_gradient(r_PH.detach(), rows_SH, correction_S, columns_P)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient_PH, r_PH.grad)


def test_positions_without_a_target_teach_nothing() -> None:
    """Head 2 has no target anywhere: it stays the identity while head 1 moves."""
    corpus, lm_head_VH = counting_corpus(2)
    corpus.targets_TK[:, 1] = NO_TARGET
    heads = MedusaHeads(2, HIDDEN)
    train_heads(heads, corpus, lm_head_VH, TrainOptions(epochs=1))
    assert heads.weight_KHH[0].abs().max() > 0
    assert heads.weight_KHH[1].abs().max() == 0


@pytest.mark.parametrize("choices", [[], [(0,), (0, 0), (1,)]])
def test_folder_is_the_published_layout(tmp_path: Path, choices: list[tuple[int, ...]]) -> None:
    torch.manual_seed(3)
    heads = MedusaHeads(2, HIDDEN)
    torch.nn.init.normal_(heads.weight_KHH)
    torch.nn.init.normal_(heads.bias_KH)
    save_heads(tmp_path, heads, "some/base", choices)
    tensors = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()} == {
        "0.0.linear.weight": (torch.bfloat16, (HIDDEN, HIDDEN)),
        "0.0.linear.bias": (torch.bfloat16, (HIDDEN,)),
        "1.0.linear.weight": (torch.bfloat16, (HIDDEN, HIDDEN)),
        "1.0.linear.bias": (torch.bfloat16, (HIDDEN,)),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["version"] == "2" and config["medusa_num_heads"] == 2
    assert ("medusa_choices" in config) is bool(choices)
    loaded, found = load_heads(tmp_path)
    assert found == choices
    assert torch.equal(loaded.weight_KHH, heads.weight_KHH.detach().bfloat16().float())
    assert torch.equal(loaded.bias_KH, heads.bias_KH.detach().bfloat16().float())
