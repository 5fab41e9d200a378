"""Ranks, the tree search and the count of steps, against slow and plain versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.train import loss, measure
from lorastack.train.corpus import NO_TARGET
from lorastack.train.heads import MedusaHeads, identity_heads
from lorastack.train.measure import (
    NO_RANK,
    expected_tokens,
    measure_heads,
    rank_accuracies,
    search_choices,
    summary,
    target_ranks,
    tokens_per_step,
)
from lorastack.train.vocabulary import output_of
from tests.train.corpora import HIDDEN, corpus_of, counting_corpus, lm_head

CPU = torch.device("cpu")


def test_ranks_count_better_tokens_and_ties_go_to_the_lowest_id() -> None:
    rows_NH = torch.tensor([[3.0], [1.0], [2.0], [2.0], [0.0]])
    columns_P = torch.tensor([0, 2, 3, 4, NO_TARGET])
    rank_P, loss_P = target_ranks(torch.ones(5, 1), rows_NH, columns_P)
    assert rank_P.tolist() == [0, 1, 2, 4, 5]
    wanted_P = torch.log_softmax(rows_NH[:, 0], 0)[[0, 2, 3, 4]]
    torch.testing.assert_close(loss_P, torch.cat([-wanted_P, torch.zeros(1)]))


@given(st.sets(st.integers(0, 8), min_size=1), st.integers(0, 99), st.booleans())
def test_ranks_among_a_draft_vocabulary(
    tmp_path_factory: pytest.TempPathFactory, vocabulary: set[int], seed: int, whole: bool
) -> None:
    """In slices and batches of odd sizes; zero weights make every head the identity."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(seed)
    lm_head_VH = torch.randn(9, 4, generator=generator)
    answers = torch.randint(9, (4, 5), generator=generator).tolist()
    states = [torch.randn(5, 4, generator=generator) for _ in answers]
    corpus = corpus_of(folder, answers, states)
    ids = list(range(9)) if whole else sorted(vocabulary)
    output = output_of(
        lm_head_VH, None if whole else torch.tensor(ids), device=CPU, dtype=torch.float32
    )
    positions_P = torch.tensor([*range(7, 20), 2, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_LEAST_POSITIONS", 2)
        patch.setattr(loss, "_CPU_LOGITS", 1)
        patch.setattr(measure, "_BATCH", 7)
        measured = measure_heads(identity_heads(2, 1, 4), corpus, positions_P, output)
    losses: list[list[float]] = [[], []]
    for position, rank_K in zip(positions_P.tolist(), measured.ranks_PK.tolist(), strict=True):
        sample, at = divmod(position, 5)
        logits_V = lm_head_VH @ states[sample][at]
        guesses = sorted(ids, key=lambda token: -float(logits_V[token]))
        for head, rank in enumerate(rank_K):
            if at + head + 1 >= 5:
                assert rank == NO_RANK
                continue
            target = answers[sample][at + head + 1]
            assert rank == (guesses.index(target) if target in ids else len(ids))
            if target in ids:
                log_N = torch.log_softmax(logits_V[ids], 0)
                losses[head].append(-float(log_N[ids.index(target)]))
    for found, wanted in zip(measured.loss_K, losses, strict=True):
        mean = sum(wanted) / len(wanted) if wanted else float("nan")
        assert found == pytest.approx(mean, abs=1e-5, nan_ok=True)


def test_version_1_heads_are_measured_by_their_own_outputs(tmp_path: Path) -> None:
    corpus, own_VH = counting_corpus(tmp_path), lm_head().roll(-1, 0)
    heads = MedusaHeads(identity_heads(2, 1, HIDDEN).heads, (own_VH, own_VH.roll(-1, 0).half()))
    output = output_of(torch.zeros_like(own_VH), None, device=CPU, dtype=torch.float32)
    positions_P = torch.arange(30)
    measured = measure_heads(heads, corpus, positions_P, output)
    # The state is the vector of the token before: one further on is the answer's own token, which
    # no head has to guess.
    wanted_V = (lm_head() @ lm_head().T).roll(-1, 0)
    for position, target in enumerate(corpus.targets(positions_P, 1)[:-1, 0].tolist()):
        before = (position - 1) % 7
        ahead = int((wanted_V[:, before] > wanted_V[target, before]).sum())
        assert int(measured.ranks_PK[position, 0]) == ahead


def test_accuracies_leave_out_positions_without_a_target() -> None:
    ranks_PK = torch.tensor([[0, 1], [0, NO_RANK], [1, NO_RANK], [7, 0]])
    assert rank_accuracies(ranks_PK, 3) == [[0.5, 0.25, 0.0], [0.5, 0.5, 0.0]]


@given(st.lists(st.tuples(*[st.integers(-1, 3)] * 3), max_size=40), st.integers(0, 12))
def test_chosen_trees_catch_the_most_guesses(
    rows: list[tuple[int, int, int]], num_nodes: int
) -> None:
    ranks_PK = torch.tensor(rows).reshape(-1, 3)
    choices = search_choices(ranks_PK, num_nodes, num_ranks=3)
    worths = [sum(row[: len(path)] == path for row in rows) for path in choices]
    assert worths == sorted(worths, reverse=True)
    assert all(len(path) == 1 or path[:-1] in choices[:i] for i, path in enumerate(choices))
    right = {row[:k] for row in rows for k in (1, 2, 3) if all(0 <= r < 3 for r in row[:k])}
    left_out = [sum(row[: len(path)] == path for row in rows) for path in right - set(choices)]
    assert len(choices) == min(num_nodes, len(right))
    assert not worths or max(left_out, default=0) <= worths[-1]
    assert expected_tokens(ranks_PK, choices) == 1 + sum(worths) / max(1, len(rows))


def test_steps_are_counted_as_decoding_would() -> None:
    # Two answers. First: the prefill emits token 0; the step at 0 accepts (0,), and so on.
    first = [[0, 1], [5, 0], [0, 0], [0, NO_RANK], [NO_RANK, NO_RANK]]  # 5 tokens
    second = [[1, 0], [0, NO_RANK], [NO_RANK, NO_RANK]]  # 3 tokens
    ranks_PK = torch.tensor([*first, *second])
    starts = [0, 5, 8]
    assert tokens_per_step(ranks_PK, starts, []) == (6, 6)
    # Chain of one: 0 -> 2 (accept 1), 2 -> 4 (accept 1); 5 -> 6, 6 -> 7.
    assert tokens_per_step(ranks_PK, starts, [(0,)]) == (6, 4)
    # (1, 0) lets the second answer take everything in one step.
    assert tokens_per_step(ranks_PK, starts, [(0,), (1,), (1, 0)]) == (6, 3)


def test_a_summary_has_them_all(tmp_path: Path) -> None:
    corpus = counting_corpus(tmp_path)
    output = output_of(lm_head(), None, device=CPU, dtype=torch.float32)
    heads = identity_heads(2, 1, HIDDEN)
    measured = measure_heads(heads, corpus, torch.arange(60), output)
    found = summary(measured, [0, 30, 60])
    assert (found.num_samples, found.num_positions) == (2, 60)
    assert found.loss_K == measured.loss_K
    one = rank_accuracies(measured.ranks_PK)
    assert [row[9] for row in found.top_KR] == pytest.approx([sum(row) for row in one])
    for nodes, rate in found.trees.items():
        tokens, steps = tokens_per_step(measured.ranks_PK, [0, 30, 60], found.choices[:nodes])
        assert rate == tokens / steps
    tokens, steps = tokens_per_step(measured.ranks_PK, [0, 30, 60], [(0,), (0, 0)])
    assert found.chain[2] == tokens / steps
