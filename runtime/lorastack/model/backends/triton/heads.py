"""Heads within a step: what they propose at the ends of accepted paths, with no host in between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorastack.kernels.heads import HeadsWeights, TopTokens
from lorastack.kernels.triton.heads import logits, states
from lorastack.kernels.triton.heads_plan import Layout, Pairs, Tile, lay_out
from lorastack.kernels.triton.top import top
from lorastack.model.backends.triton.packed import Fields, Packed
from lorastack.model.context import SampledTree

PREFIX = "heads_"


@dataclass(frozen=True, slots=True)
class HeadsPlan:
    """What rows ask of heads. rows: in the order of the layout's pairs, each with the place of its
    first pair and its number of heads; num: tokens of each head."""

    layout: Layout
    groups: Sequence[HeadsWeights]
    rows: Sequence[tuple[int, int, int]]
    num: int

    @classmethod
    def of(cls, groups: Iterable[tuple[HeadsWeights, Sequence[int]]], num: int) -> HeadsPlan:
        """groups: heads, and the rows that use them."""
        groups = list(groups)
        rows, first = [], 0
        for heads, members in groups:
            for row in members:
                rows.append((row, first, heads.num_heads))
                first += heads.num_heads
        return cls(lay_out(groups), [heads for heads, _ in groups], rows, num)

    @property
    def num_pairs(self) -> int:
        return len(self.layout.tree_Y)

    @property
    def num_drafts(self) -> int:
        """Ids and log-probabilities of all pairs."""
        return 2 * self.num_pairs * self.num

    @property
    def num_blocks(self) -> int:
        """Of the heads that have most."""
        return max(len(heads.bias_LKH) for heads in self.groups)

    def take(self, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """ids_YR, int32, and logprobs_YR, float32, as views of the first of flat int32 numbers."""
        ids, logprobs = drafts[: self.num_drafts].view(2, self.num_pairs, self.num)
        return ids, logprobs.view(torch.float32)


def plan_heads(trees: Sequence[SampledTree], max_pairs: int) -> HeadsPlan | None:
    """The trees' asks, as far as there is room for their pairs; None without any."""
    groups: dict[int, tuple[HeadsWeights, list[int]]] = {}
    num_pairs = num = 0
    for index, each in enumerate(trees):
        if each.ask is None or num_pairs + each.ask.heads.num_heads > max_pairs:
            continue
        heads = each.ask.heads
        groups.setdefault(id(heads), (heads, []))[1].append(index)
        num_pairs += heads.num_heads
        num = max(num, each.ask.num_candidates)
    return HeadsPlan.of(groups.values(), num) if groups else None


def heads_fields(max_pairs: int) -> Fields:
    """What `Pairs` takes of a `Packed`."""
    tiles, words = (max_pairs, len(Tile._fields)), (max_pairs,)
    kinds = {
        "states_GF": (torch.int64, tiles),
        "outputs_GF": (torch.int64, tiles),
        "tree_Y": (torch.int32, words),
        "num_outputs_Y": (torch.int32, words),
        "ids_Y": (torch.int64, words),
        "counts": (torch.int32, (3,)),
    }
    return {PREFIX + name: kind for name, kind in kinds.items()}


def heads_pairs(packed: Packed) -> Pairs:
    """Those on the device."""
    return Pairs(*(packed.device[PREFIX + name] for name in Pairs._fields))


def fill_heads(packed: Packed, layout: Layout) -> None:
    """Lays them out on the host."""
    host = {name: packed.host[PREFIX + name] for name in Pairs._fields}
    num_states, num_outputs = len(layout.states), len(layout.outputs)
    num_pairs = len(layout.tree_Y)
    host["counts"][:] = (num_states, num_outputs, num_pairs)
    host["states_GF"][:num_states] = layout.states
    if num_outputs:
        host["outputs_GF"][:num_outputs] = layout.outputs
    host["tree_Y"][:num_pairs] = layout.tree_Y
    host["num_outputs_Y"][:num_pairs] = layout.num_outputs_Y
    host["ids_Y"][:num_pairs] = layout.ids_Y


def launch_states(hidden_XH: Tensor, ends_B: Tensor, pairs: Pairs, plan: HeadsPlan) -> Tensor:
    """r_LYH: each pair's state after each of its blocks. See `kernels.triton.heads.states`."""
    num_blocks = plan.num_blocks
    r_LYH = hidden_XH.new_empty(num_blocks, plan.num_pairs, hidden_XH.shape[1])
    layout = plan.layout
    num_tiles = len(layout.states)
    states(hidden_XH, ends_B, pairs, r_LYH, num_tiles, num_blocks, layout.max_rank)
    return r_LYH


def launch_heads(
    hidden_XH: Tensor, ends_B: Tensor, pairs: Pairs, plan: HeadsPlan, drafts: Tensor
) -> None:
    """Fills what `plan.take` gives of `drafts`. All heads have outputs of their own."""
    num_pairs, layout = plan.num_pairs, plan.layout
    r_LYH = launch_states(hidden_XH, ends_B, pairs, plan)
    size = (num_pairs, max(layout.num_outputs_Y))
    logits_YN = torch.empty(size, dtype=torch.float32, device=hidden_XH.device)
    logits(r_LYH, pairs, logits_YN, len(layout.outputs))
    top(logits_YN, pairs, *plan.take(drafts), num_pairs)


def warm_heads(hidden_XH: Tensor, ends_B: Tensor, pairs: Pairs, drafts: Tensor) -> None:
    """Launches for no pair all that heads take, so that it is compiled. pairs: there are none."""
    r_LYH = hidden_XH.new_empty(2, 1, hidden_XH.shape[1])  # blocks behind the first: other code
    for max_rank in (0, 1):  # private parts: other code
        states(hidden_XH, ends_B, pairs, r_LYH, 1, len(r_LYH), max_rank)
    logits_YN = torch.empty(1, 1, dtype=torch.float32, device=hidden_XH.device)
    logits(r_LYH, pairs, logits_YN, 1)
    ids_YR, logprobs_YR = drafts[:2].view(2, 1, 1)
    top(logits_YN, pairs, ids_YR, logprobs_YR.view(torch.float32), 1)


def top_of(plan: HeadsPlan, drafts: Tensor, num_rows: int) -> list[TopTokens | None]:
    """What each of the rows was given, out of the downloaded `drafts`; None for others."""
    ids_YR, logprobs_YR = plan.take(drafts)
    found: list[TopTokens | None] = [None] * num_rows
    for row, first, num_heads in plan.rows:
        pairs = slice(first, first + num_heads)
        found[row] = TopTokens(ids_YR[pairs].long(), logprobs_YR[pairs])
    return found
