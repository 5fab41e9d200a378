"""How good heads are: accuracies by head and rank, the best tree, tokens a step.

Greedy verification accepts the tree path whose tokens are the base's own next tokens, so the ranks
of those tokens among each head's guesses say everything: no tree has to be decoded.

Shape suffixes: T positions, K heads, P positions of a chunk, V vocabulary,
N tokens that the heads choose from.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lorastack.train.heads import MedusaHeads, Path_
from lorastack.train.hidden import NO_TARGET, HiddenCorpus

NO_RANK = -1


@torch.inference_mode()
def target_ranks(
    heads: MedusaHeads,
    corpus: HiddenCorpus,
    lm_head_VH: Tensor,
    vocabulary_N: Tensor | None = None,
    chunk: int = 512,
) -> Tensor:
    """[T, K]: the target's rank among the head's guesses, from 0; ties go to the lowest id.

    vocabulary_N: rising ids of the tokens that the heads choose from, None for all; a target that
    is not among them ranks last.
    """
    ranks_TK = torch.full_like(corpus.targets_TK, NO_RANK)
    rows_NH, column_V = lm_head_VH, torch.arange(len(lm_head_VH))
    if vocabulary_N is not None:
        rows_NH, column_V = lm_head_VH[vocabulary_N], torch.full((len(lm_head_VH),), NO_TARGET)
        column_V[vocabulary_N] = torch.arange(len(vocabulary_N))
    columns_N = torch.arange(len(rows_NH))
    for begin in range(0, len(ranks_TK), chunk):
        x_PH = corpus.hidden_TH[begin : begin + chunk].to(lm_head_VH.dtype)
        for head in range(heads.num_heads):
            target_P = corpus.targets_TK[begin : begin + chunk, head]
            column_P1 = column_V[target_P.clamp(min=0)][:, None]
            logits_PN = (heads(x_PH, head) @ rows_NH.T).float()
            score_P1 = logits_PN.gather(1, column_P1.clamp(min=0))
            ahead_PN = logits_PN > score_P1
            ahead_PN |= (logits_PN == score_P1) & (columns_N < column_P1)
            rank_P = ahead_PN.sum(-1).masked_fill(column_P1[:, 0] == NO_TARGET, len(rows_NH))
            rank_P[target_P == NO_TARGET] = NO_RANK
            ranks_TK[begin : begin + chunk, head] = rank_P
    return ranks_TK


def rank_accuracies(ranks_TK: Tensor, num_ranks: int = 10) -> list[list[float]]:
    """[K][num_ranks]: the share of positions with a target where guess number r is right."""
    table = []
    for rank_T in ranks_TK.T:
        counted_T = rank_T[rank_T != NO_RANK]
        hits = torch.bincount(counted_T[counted_T < num_ranks], minlength=num_ranks)
        table.append((hits / max(1, len(counted_T))).tolist())
    return table


def search_choices(ranks_TK: Tensor, num_nodes: int = 63, num_ranks: int = 10) -> list[Path_]:
    """Paths in order of worth: every prefix of the list is a tree, and the best of its size.

    A path's worth is the number of positions where all of it is right. Its prefix is right there
    too, so counting is all the search there is; a product of the heads' accuracies would miss that
    a head is mostly right where those before it are.
    """
    counts: Counter[Path_] = Counter()
    for row in ranks_TK.tolist():
        for depth, rank in enumerate(row, start=1):
            if not 0 <= rank < num_ranks:
                break
            counts[tuple(row[:depth])] += 1
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return ordered[:num_nodes]


def tokens_per_step(
    ranks_TK: Tensor, starts: Sequence[int], choices: Sequence[Path_]
) -> tuple[int, int]:
    """(tokens, steps) of greedy decoding with this tree, over all samples.

    The first token of an answer comes from the prefill and counts as neither. A step at position t
    verifies the tree that the heads built there: it emits the accepted path and one token more.
    """
    tree = set(choices)
    tokens = steps = 0
    for begin, end in pairwise(starts):
        rows = ranks_TK[begin:end].tolist()
        at, last = 0, len(rows) - 1  # position i emits answer token i
        while at < last:
            row = rows[at]
            accepted = 0
            while accepted < len(row) and tuple(row[: accepted + 1]) in tree:
                accepted += 1
            advance = min(accepted + 1, last - at)  # nothing follows the last token
            at += advance
            tokens += advance
            steps += 1
    return tokens, steps
