"""What else is asked of logits and states on the device, by Triton's kernels.

A step's own tokens and drafts do not come this way (see `layers` and `heads`): these calls serve
rows whose logits the host changes, and heads that choose through lm_head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.kernels.heads import HeadsGroup, TopTokens
from lorastack.kernels.ops import Ops
from lorastack.kernels.sample import Sample, sample_torch
from lorastack.kernels.triton.heads_plan import Layout, Pairs
from lorastack.kernels.triton.samples import (
    SETTINGS,
    Nodes,
    Sampled,
    num_spans,
    sample,
    settings_of,
)
from lorastack.kernels.triton.top import top
from lorastack.model.backends.triton.heads import HeadsPlan, launch_heads, launch_states


class TritonOps(Ops):
    """On one device, with float32 logits. Each call brings its numbers there by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def best(self, logits_XV: Tensor) -> tuple[Tensor, Tensor]:
        sampled = self._sampled(logits_XV, [-1] * len(logits_XV), [])
        return sampled.peaks_X, sampled.best_X.long()

    def top(self, logits_XV: Tensor, num: int) -> TopTokens:
        num_rows, vocab_size = logits_XV.shape
        pairs = self._pairs(Layout([], [], [0] * num_rows, [vocab_size] * num_rows, [0] * num_rows))
        ids_XR = torch.empty((num_rows, num), dtype=torch.int32, device=self._device)
        logprobs_XR = torch.empty((num_rows, num), dtype=torch.float32, device=self._device)
        if num_rows:
            top(logits_XV.contiguous(), pairs, ids_XR, logprobs_XR, num_rows)
        return TopTokens(ids_XR.long(), logprobs_XR)

    def states(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> Tensor:
        plan = _plan(groups, 1)
        parts_XH, first = [hidden_BH[:0]], 0
        if plan.num_pairs:
            r_LYH = launch_states(hidden_BH, self._rows(hidden_BH), self._pairs(plan.layout), plan)
        for group in groups:
            last = len(group.heads.bias_LKH) - 1
            if group.num_states:
                parts_XH.append(r_LYH[last, first : first + group.num_states])
            first += group.num_states
        return torch.cat(parts_XH)

    def propose(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup], num: int) -> TopTokens:
        plan = _plan(groups, num)
        drafts = torch.empty(plan.num_drafts, dtype=torch.int32, device=self._device)
        if plan.num_pairs:
            pairs = self._pairs(plan.layout)
            launch_heads(hidden_BH, self._rows(hidden_BH), pairs, plan, drafts)
        ids_YR, logprobs_YR = plan.take(drafts)
        return TopTokens(ids_YR.long(), logprobs_YR)

    def _sample(self, logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
        here = [each for each in samples if each.params.typical_p >= 1]
        typical = [each for each in samples if each.params.typical_p < 1]
        others = iter(sample_torch(logits_XV, typical))
        rows_XV = logits_XV[[each.row for each in here]]
        settings = [settings_of(each.params, each.token_index) for each in here]
        sampled = self._sampled(rows_XV, range(len(here)), settings)
        found = iter(sampled.tokens_X.tolist())
        return [next(found if each.params.typical_p >= 1 else others) for each in samples]

    def _sampled(
        self, logits_XV: Tensor, trees: Sequence[int], settings: Sequence[tuple[int, ...]]
    ) -> Sampled:
        """Of each row: the tree of one node that it is, -1 for none, and each tree's settings."""
        num_rows, vocab_size = logits_XV.shape
        values = torch.tensor([*trees, num_rows], dtype=torch.int32, device=self._device)
        settings_BS = torch.tensor(settings or [(0,) * SETTINGS], device=self._device)
        nodes = Nodes(values[:-1], torch.zeros_like(values[:-1]), settings_BS, values[-1:])
        peaks_X = torch.empty(num_rows, dtype=torch.float32, device=self._device)
        sampled = Sampled(peaks_X, torch.empty_like(values[:-1]), torch.empty_like(values[:-1]))
        keys_XS = settings_BS.new_empty(num_rows, num_spans(vocab_size))
        if num_rows:
            sample(logits_XV.contiguous(), nodes, keys_XS, sampled, num_rows)
        return sampled

    def _pairs(self, layout: Layout) -> Pairs:
        counts = [len(layout.states), len(layout.outputs), len(layout.tree_Y)]
        kinds = {"tree_Y": torch.int32, "num_outputs_Y": torch.int32, "counts": torch.int32}
        values = (*layout, counts)
        return Pairs(
            *(
                torch.tensor(each, dtype=kinds.get(name, torch.int64), device=self._device)
                for name, each in zip(Pairs._fields, values, strict=True)
            )
        )

    def _rows(self, hidden_BH: Tensor) -> Tensor:
        """Where each row's state stands: at its own place."""
        return torch.arange(len(hidden_BH), dtype=torch.int32, device=self._device)


def _plan(groups: Sequence[HeadsGroup], num: int) -> HeadsPlan:
    return HeadsPlan.of([(each.heads, range(each.start, each.end)) for each in groups], num)
