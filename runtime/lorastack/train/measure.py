"""How good heads are: accuracies by head and rank, the best tree, tokens a step.

Greedy verification accepts the tree path whose tokens are the model's own next tokens, so the ranks
of those tokens among each head's guesses say everything: no tree has to be decoded.

Shape suffixes: P positions, K heads, C positions of a slice, N tokens that the heads choose from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lorastack.train.corpus import NO_TARGET, Corpus
from lorastack.train.heads import MedusaHeads
from lorastack.train.loss import slices
from lorastack.train.vocabulary import Output

NO_RANK = -1
NUM_RANKS = 10
TREES = (4, 8, 16, 24)  # nodes
_BATCH = 2048  # positions that are read at once

TreePath = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """ranks_PK: int32, see `target_ranks`. loss_K: mean cross entropies in nats, over the positions
    whose target is among the tokens that the heads choose from; NaN without any."""

    ranks_PK: Tensor
    loss_K: list[float]


@torch.inference_mode()
def measure_heads(
    heads: MedusaHeads, corpus: Corpus, positions_P: Tensor, output: Output
) -> Measured:
    """Reads the states a batch at a time. heads: on the output's device; computes in its dtype.

    Version 1 heads choose by their own outputs.
    """

    def states() -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, len(positions_P), _BATCH):
            batch_P = positions_P[begin : begin + _BATCH]
            yield corpus.hidden(batch_P), corpus.targets(batch_P, heads.num_heads)

    return measure_states(heads, states(), output)


@torch.inference_mode()
def measure_states(
    heads: MedusaHeads, states: Iterable[tuple[Tensor, Tensor]], output: Output
) -> Measured:
    """As `measure_heads`, of batches of states [P, H] and their targets [P, K]."""
    ranks, rows_NH = [], output.rows_NH
    loss_K = torch.zeros(heads.num_heads, dtype=torch.float64)
    count_K = torch.zeros(heads.num_heads, dtype=torch.float64)
    for state_PH, target_PK in states:
        x_PH = state_PH.to(rows_NH.device, rows_NH.dtype)
        targets_PK = target_PK.to(rows_NH.device)
        ranks_PK = torch.full_like(targets_PK, NO_RANK, dtype=torch.int32)
        for head in range(heads.num_heads):
            target_P = targets_PK[:, head]
            if heads.outputs:
                rows_NH, column_P = heads.outputs[head].to(x_PH.dtype), target_P
            else:
                column_P = output.columns(target_P)
            rank_P, loss_P = target_ranks(heads.state(x_PH, head), rows_NH, column_P)
            ranks_PK[:, head] = rank_P.masked_fill(target_P == NO_TARGET, NO_RANK)
            loss_K[head] += loss_P.double().sum().cpu()
            count_K[head] += (column_P != NO_TARGET).sum().cpu()
        ranks.append(ranks_PK.cpu())
    no_ranks = torch.empty(0, heads.num_heads, dtype=torch.int32)
    return Measured(torch.cat([no_ranks, *ranks]), (loss_K / count_K).tolist())


def target_ranks(r_PH: Tensor, rows_NH: Tensor, columns_P: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 ranks, float32 cross entropies), [P]: of the target among all N, best is 0.

    columns_P: the targets' places among the rows. Ties go to the lowest place; a target without a
    place ranks last and costs nothing.
    """
    rank_P, loss_P = torch.empty_like(columns_P), r_PH.new_empty(len(r_PH), dtype=torch.float32)
    place_N = torch.arange(len(rows_NH), device=r_PH.device)
    for part in slices(len(r_PH), rows_NH):
        logits_CN = (r_PH[part] @ rows_NH.T).float()
        column_C1 = columns_P[part, None]
        score_C1 = logits_CN.gather(1, column_C1.clamp(min=0))
        ahead_CN = logits_CN > score_C1
        ahead_CN |= (logits_CN == score_C1) & (place_N < column_C1)
        missing_C = column_C1[:, 0] == NO_TARGET
        rank_P[part] = ahead_CN.sum(-1).masked_fill(missing_C, len(rows_NH))
        cross_C = logits_CN.logsumexp(-1) - score_C1[:, 0]
        loss_P[part] = cross_C.masked_fill(missing_C, 0.0)
    return rank_P, loss_P


def rank_accuracies(ranks_PK: Tensor, num_ranks: int = NUM_RANKS) -> list[list[float]]:
    """[K][num_ranks]: the share of positions with a target where guess number r is right."""
    table = []
    for rank_P in ranks_PK.T:
        counted_P = rank_P[rank_P != NO_RANK]
        hits = torch.bincount(counted_P[counted_P < num_ranks], minlength=num_ranks)
        table.append((hits / max(1, len(counted_P))).tolist())
    return table


def search_choices(
    ranks_PK: Tensor, num_nodes: int = 63, num_ranks: int = NUM_RANKS
) -> list[TreePath]:
    """Paths in order of worth: every prefix of the list is a tree, and the best of its size.

    A path's worth is the number of positions where all of it is right. Its prefix is right there
    too, so counting is all the search there is; a product of the heads' accuracies would miss that
    a head is mostly right where those before it are.
    """
    counts = _worths(ranks_PK, num_ranks)
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return ordered[:num_nodes]


def expected_tokens(ranks_PK: Tensor, choices: Sequence[TreePath]) -> float:
    """Tokens of a step with this tree, at positions taken evenly; those without a next token count.

    choices: every path's prefixes are among them. Steps of real decoding begin where others ended,
    which `tokens_per_step` follows; this mean of all positions has less noise.
    """
    counts = _worths(ranks_PK, NUM_RANKS)
    return 1 + sum(counts[path] for path in choices) / max(1, len(ranks_PK))


def tokens_per_step(
    ranks_PK: Tensor, starts: Sequence[int], choices: Sequence[TreePath]
) -> tuple[int, int]:
    """(tokens, steps) of greedy decoding with this tree, over all samples.

    starts: where each sample's positions begin, and the last one's end. The first token of an
    answer comes from the prefill and counts as neither. A step at position t verifies the tree that
    the heads built there: it emits the accepted path and one token more.
    """
    tree = set(choices)
    tokens = steps = 0
    for begin, end in pairwise(starts):
        rows = ranks_PK[begin:end].tolist()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the heads are worth on these positions.

    top_KR: the share of targets among the best r + 1 guesses. chain, trees: tokens a step of greedy
    decoding, by length of the chain of best guesses and by nodes of the best static tree, which was
    chosen for these very positions. choices: see `search_choices`.
    """

    num_samples: int
    num_positions: int
    loss_K: list[float]
    top_KR: list[list[float]]
    chain: dict[int, float]
    trees: dict[int, float]
    choices: list[TreePath]


def summary(measured: Measured, starts: Sequence[int]) -> Summary:
    """starts: as in `tokens_per_step`."""
    ranks_PK = measured.ranks_PK
    choices = search_choices(ranks_PK)
    chain = [(0,) * depth for depth in range(1, ranks_PK.shape[1] + 1)]

    def rate(tree: Sequence[TreePath]) -> float:
        tokens, steps = tokens_per_step(ranks_PK, starts, tree)
        return tokens / max(1, steps)

    return Summary(
        num_samples=len(starts) - 1,
        num_positions=len(ranks_PK),
        loss_K=measured.loss_K,
        top_KR=[list(accumulate(row)) for row in rank_accuracies(ranks_PK)],
        chain={len(path): rate(chain[: len(path)]) for path in chain},
        trees={nodes: rate(choices[:nodes]) for nodes in TREES},
        choices=choices,
    )


def _worths(ranks_PK: Tensor, num_ranks: int) -> Counter[TreePath]:
    """The number of positions where all of a path is right, by path."""
    counts: Counter[TreePath] = Counter()
    for row in ranks_PK.tolist():
        for depth, rank in enumerate(row, start=1):
            if not 0 <= rank < num_ranks:
                break
            counts[tuple(row[:depth])] += 1
    return counts
