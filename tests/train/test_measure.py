"""Ranks, the tree search and the count of steps, against slow and plain versions."""

import torch

from lorastack.train.heads import MedusaHeads
from lorastack.train.hidden import NO_TARGET, HiddenCorpus
from lorastack.train.measure import (
    NO_RANK,
    rank_accuracies,
    search_choices,
    target_ranks,
    tokens_per_step,
)

ACCURACIES = [[0.5, 0.2, 0.1, 0.0], [0.4, 0.1, 0.05, 0.02], [0.3, 0.1, 0.02, 0.01]]


def worth(path: tuple[int, ...]) -> float:
    product = 1.0
    for head, rank in enumerate(path):
        product *= ACCURACIES[head][rank]
    return product


def test_ranks_count_better_tokens_and_ties_go_to_the_lowest_id() -> None:
    lm_head_VH = torch.tensor([[3.0], [1.0], [2.0], [2.0], [0.0]])
    targets_TK = torch.tensor([[0], [2], [3], [4], [NO_TARGET]])
    corpus = HiddenCorpus(torch.ones(5, 1), targets_TK, [0, 5])
    ranks_TK = target_ranks(MedusaHeads(1, 1), corpus, lm_head_VH, chunk=2)
    assert ranks_TK[:, 0].tolist() == [0, 1, 2, 4, NO_RANK]


def test_accuracies_leave_out_positions_without_a_target() -> None:
    ranks_TK = torch.tensor([[0, 1], [0, NO_RANK], [1, NO_RANK], [7, 0]])
    assert rank_accuracies(ranks_TK, 3) == [[0.5, 0.25, 0.0], [0.5, 0.5, 0.0]]


def test_every_prefix_of_the_choices_is_a_tree() -> None:
    choices = search_choices(ACCURACIES, 20)
    assert len(choices) == len(set(choices)) == 20
    for size in range(len(choices)):
        tree = set(choices[:size])
        path = choices[size]
        assert len(path) == 1 or path[:-1] in tree
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree


def test_choices_come_in_order_of_worth() -> None:
    choices = search_choices(ACCURACIES, 20)
    worths = [worth(path) for path in choices]
    assert worths == sorted(worths, reverse=True)
    assert choices[:4] == [(0,), (0, 0), (1,), (2,)]


def test_choices_end_where_the_table_does() -> None:
    assert sorted(search_choices([[0.5, 0.1], [0.4, 0.2]], 63)) == [
        (0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1),
    ]  # fmt: skip


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
