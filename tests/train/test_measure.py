"""Ranks, the tree search and the count of steps, against slow and plain versions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.train.heads import MedusaHeads
from lorastack.train.hidden import NO_TARGET, HiddenCorpus
from lorastack.train.measure import (
    NO_RANK,
    rank_accuracies,
    search_choices,
    target_ranks,
    tokens_per_step,
)


def test_ranks_count_better_tokens_and_ties_go_to_the_lowest_id() -> None:
    lm_head_VH = torch.tensor([[3.0], [1.0], [2.0], [2.0], [0.0]])
    targets_TK = torch.tensor([[0], [2], [3], [4], [NO_TARGET]])
    corpus = HiddenCorpus(torch.ones(5, 1), targets_TK, [0, 5])
    ranks_TK = target_ranks(MedusaHeads(1, 1), corpus, lm_head_VH, chunk=2)
    assert ranks_TK[:, 0].tolist() == [0, 1, 2, 4, NO_RANK]


@given(st.sets(st.integers(0, 8), min_size=1), st.integers(0, 99))
def test_ranks_among_a_draft_vocabulary(vocabulary: set[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lm_head_VH = torch.randn(9, 4, generator=generator)
    targets_TK = torch.randint(-1, 9, (20, 2), generator=generator)
    corpus = HiddenCorpus(torch.randn(20, 4, generator=generator), targets_TK, [0, 20])
    heads = MedusaHeads(2, 4)
    ids = sorted(vocabulary)
    ranks_TK = target_ranks(heads, corpus, lm_head_VH, torch.tensor(ids), chunk=7)
    for x_H, target_K, rank_K in zip(corpus.hidden_TH, targets_TK, ranks_TK, strict=True):
        logits_V = lm_head_VH @ x_H  # zero weights: every head is the identity
        guesses = sorted(ids, key=lambda token: -float(logits_V[token]))
        for target, rank in zip(target_K.tolist(), rank_K.tolist(), strict=True):
            if target == NO_TARGET:
                assert rank == NO_RANK
            else:
                assert rank == (guesses.index(target) if target in ids else len(ids))


def test_accuracies_leave_out_positions_without_a_target() -> None:
    ranks_TK = torch.tensor([[0, 1], [0, NO_RANK], [1, NO_RANK], [7, 0]])
    assert rank_accuracies(ranks_TK, 3) == [[0.5, 0.25, 0.0], [0.5, 0.5, 0.0]]


@given(st.lists(st.tuples(*[st.integers(-1, 3)] * 3), max_size=40), st.integers(0, 12))
def test_chosen_trees_catch_the_most_guesses(
    rows: list[tuple[int, int, int]], num_nodes: int
) -> None:
    choices = search_choices(torch.tensor(rows).reshape(-1, 3), num_nodes, num_ranks=3)
    worths = [sum(row[: len(path)] == path for row in rows) for path in choices]
    assert worths == sorted(worths, reverse=True)
    assert all(len(path) == 1 or path[:-1] in choices[:i] for i, path in enumerate(choices))
    right = {row[:k] for row in rows for k in (1, 2, 3) if all(0 <= r < 3 for r in row[:k])}
    left_out = [sum(row[: len(path)] == path for row in rows) for path in right - set(choices)]
    assert len(choices) == min(num_nodes, len(right))
    assert not worths or max(left_out, default=0) <= worths[-1]


def test_steps_are_counted_as_decoding_would() -> None:
    # Two answers. First: the prefill emits token 0; the step at 0 accepts (0,), and so on.
    first = [[0, 1], [5, 0], [0, 0], [0, NO_RANK], [NO_RANK, NO_RANK]]  # 5 tokens
    second = [[1, 0], [0, NO_RANK], [NO_RANK, NO_RANK]]  # 3 tokens
    ranks_TK = torch.tensor([*first, *second])
    starts = [0, 5, 8]
    assert tokens_per_step(ranks_TK, starts, []) == (6, 6)
    # Chain of one: 0 -> 2 (accept 1), 2 -> 4 (accept 1); 5 -> 6, 6 -> 7.
    assert tokens_per_step(ranks_TK, starts, [(0,)]) == (6, 4)
    # (1, 0) lets the second answer take everything in one step.
    assert tokens_per_step(ranks_TK, starts, [(0,), (1,), (1, 0)]) == (6, 3)
