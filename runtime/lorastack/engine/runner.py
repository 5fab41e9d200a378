"""A batch into tensors, through the model, and back into tokens. Never touches a queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorastack.adapters.device import DeviceAdapter
from lorastack.engine.batch import Batch, Draft, RowResult, RowStep
from lorastack.errors import InternalError, Reason
from lorastack.kernels.best import best
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.context import ForwardBatch, RowSpan
from lorastack.model.decoder import Decoder
from lorastack.model.kv import KVCache
from lorastack.request import TokenLogprobs
from lorastack.sampling.sampler import draw, token_logprobs
from lorastack.speculation.accept import Accepted, DraftedTree, accept
from lorastack.speculation.heads import (
    HeadsWeights,
    apply_heads,
    output_logits,
    own_outputs,
    top_candidates,
)
from lorastack.speculation.tree import CHAIN

Weights = TypeVar("Weights", LoraWeights, HeadsWeights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A row that draws tokens. first_logit: its root's row in the step's logits."""

    index: int  # of its step in the batch
    step: RowStep
    first_logit: int

    @property
    def num_logits(self) -> int:
        return self.step.tree.num_nodes if self.step.tree else 1

    @property
    def greedy(self) -> bool:
        return self.step.request.sampling.greedy


class Runner:
    """Owns the KV tensor and borrows weights and adapters."""

    def __init__(self, decoder: Decoder, kv: KVCache) -> None:
        self._decoder = decoder
        self._kv = kv
        self._loras: WeakKeyDictionary[DeviceAdapter, LoraWeights] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[DeviceAdapter, HeadsWeights] = WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[RowResult]:
        """One forward pass; results in the order of the batch's steps."""
        hidden_TH, starts = self._forward(batch)
        results = [RowResult() for _ in batch.steps]
        sampled, rows = self._logit_rows(batch, starts)
        if not sampled:
            return results
        hidden_XH = hidden_TH[torch.tensor(rows, device=hidden_TH.device)]
        counts = [row.num_logits for row in sampled]
        segments = self._segments([row.step for row in sampled], counts)
        logits_XV = self._decoder.logits(hidden_XH, segments)
        peaks_X, best_X = (part.tolist() for part in best(logits_XV))
        accepted = self._accept(sampled, logits_XV, best_X)
        self._move_kv(sampled, accepted)
        drafts = self._draft(sampled, accepted, hidden_XH)
        for row, path, draft in zip(sampled, accepted, drafts, strict=True):
            results[row.index] = self._result(row, path, draft, logits_XV, peaks_X)
        return results

    # -- forward ----------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Hidden states of all the step's tokens, and where each row's begin."""
        token_ids: list[int] = []
        spans: list[RowSpan] = []
        for step in batch.steps:
            start = len(token_ids)
            token_ids.extend(step.token_ids)
            spans.append(
                RowSpan(
                    start=start,
                    end=len(token_ids),
                    page_table=step.page_table,
                    committed=step.committed,
                    parents=step.tree.parents if step.tree else None,
                )
            )
        forward = ForwardBatch(
            token_ids_T=torch.tensor(token_ids, device=self._decoder.device),
            rows=tuple(spans),
            lora=self._segments(batch.steps, [len(step.token_ids) for step in batch.steps]),
        )
        return self._decoder.forward(forward, self._kv), [span.start for span in spans]

    def _segments(self, steps: Sequence[RowStep], counts: Sequence[int]) -> LoraBatch:
        """Segments over rows of `counts` tokens; neighbours with one stack share theirs."""
        segments: list[Segment] = []
        start = 0
        pairs_by_stack = groupby(zip(steps, counts, strict=True), key=lambda pair: pair[0].stack)
        for _, group in pairs_by_stack:
            pairs = list(group)
            end = start + sum(count for _, count in pairs)
            first = pairs[0][0]
            for use, adapter in zip(first.request.loras, first.adapters.loras, strict=True):
                weights = self._views(self._loras, adapter, LoraWeights.from_buffer)
                segments.append(Segment(start=start, end=end, weights=weights, scale=use.scale))
            start = end
        return LoraBatch(tuple(segments))

    @staticmethod
    def _views(
        known: WeakKeyDictionary[DeviceAdapter, Weights],
        adapter: DeviceAdapter,
        build: Callable[..., Weights],
    ) -> Weights:
        """Views into the adapter's buffer, made once while it is on the device."""
        if adapter not in known:
            known[adapter] = build(adapter.buffer, adapter.layout)
        return known[adapter]

    # -- tokens -----------------------------------------------------------------------------------

    @staticmethod
    def _logit_rows(batch: Batch, starts: list[int]) -> tuple[list[Sampled], list[int]]:
        """Which hidden states need logits: all nodes of a tree, the last token of a chain."""
        sampled: list[Sampled] = []
        rows: list[int] = []
        for index, (step, start) in enumerate(zip(batch.steps, starts, strict=True)):
            if not step.samples:
                continue
            row = Sampled(index=index, step=step, first_logit=len(rows))
            end = start + len(step.token_ids)
            sampled.append(row)
            rows.extend(range(end - row.num_logits, end))
        return sampled, rows

    @staticmethod
    def _accept(sampled: list[Sampled], logits_XV: Tensor, best_X: list[int]) -> list[Accepted]:
        """Draw at each root and descend while the draw is a drafted token."""

        def draw_nodes(nodes: Sequence[tuple[int, int, int]]) -> list[int]:
            tokens = [best_X[sampled[row].first_logit + node] for row, node, _ in nodes]
            drawn = [i for i, (row, _, _) in enumerate(nodes) if not sampled[row].greedy]
            if drawn:
                picks = [(sampled[nodes[i][0]], nodes[i][1], nodes[i][2]) for i in drawn]
                draws = draw(
                    logits_XV[[row.first_logit + node for row, node, _ in picks]],
                    [row.step.request.sampling for row, _, _ in picks],
                    [row.step.num_generated + depth for row, _, depth in picks],
                )
                for i, token in zip(drawn, draws, strict=True):
                    tokens[i] = token
            return tokens

        trees = [
            DraftedTree(s.step.tree, s.step.token_ids) if s.step.tree else DraftedTree(CHAIN, (0,))
            for s in sampled
        ]
        return accept(trees, draw_nodes)

    def _move_kv(self, sampled: list[Sampled], accepted: list[Accepted]) -> None:
        """The accepted path's KV behind its root's, in order."""
        for row, path in zip(sampled, accepted, strict=True):
            places = tuple(range(1, len(path.path) + 1))
            if path.path != places:
                step = row.step
                self._kv.move(
                    step.page_table,
                    [step.committed + node for node in path.path],
                    [step.committed + place for place in places],
                )

    @staticmethod
    def _result(
        row: Sampled,
        accepted: Accepted,
        draft: Draft | None,
        logits_XV: Tensor,
        peaks_X: list[float],
    ) -> RowResult:
        nodes = [row.first_logit, *(row.first_logit + node for node in accepted.path)]
        request = row.step.request
        if not all(math.isfinite(peaks_X[node]) for node in nodes):
            names = ", ".join(use.lora_id for use in request.loras) or "the base model"
            return RowResult(
                error=InternalError(
                    f"the model gave non-finite logits with {names}; check the adapter's values "
                    "and the scale, or use a wider --dtype",
                    reason=Reason.NON_FINITE_LOGITS,
                )
            )
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.num_logprobs is not None:
            logprobs = tuple(
                token_logprobs(logits_XV[node], token, request.num_logprobs)
                for node, token in zip(nodes, accepted.tokens, strict=True)
            )
        return RowResult(
            tokens=accepted.tokens,
            num_accepted=len(accepted.path),
            logprobs=logprobs,
            draft=draft,
        )

    # -- draft ------------------------------------------------------------------------------------

    def _draft(
        self, sampled: list[Sampled], accepted: list[Accepted], hidden_XH: Tensor
    ) -> list[Draft | None]:
        """Every row's heads at its last accepted token, as one operation over the batch.

        For heads without output matrices it costs a second lm_head pass over (rows x heads),
        through the row's LoRA if that adapts lm_head.
        """
        drafts: list[Draft | None] = [None] * len(sampled)
        drafting = sorted(
            (i for i, row in enumerate(sampled) if row.step.num_candidates),
            key=lambda i: _draft_order(sampled[i].step),
        )
        if not drafting:
            return drafts
        last = [sampled[i].first_logit + (accepted[i].path or (0,))[-1] for i in drafting]
        steps = [sampled[i].step for i in drafting]
        groups = self._head_groups(steps)
        r_YH = apply_heads(hidden_XH[last], groups)
        num = max(step.num_candidates for step in steps)
        ranks = (
            tuple(ids)
            for logits_YV in self._head_logits(r_YH, steps, groups)
            for ids in top_candidates(logits_YV, num).tolist()
        )
        for i, step in zip(drafting, steps, strict=True):
            drafts[i] = tuple(islice(ranks, _heads_of(step).layout.num_heads))
        return drafts

    def _head_groups(self, steps: Sequence[RowStep]) -> list[tuple[slice, HeadsWeights]]:
        """Neighbouring rows of one heads digest, and these heads."""
        groups: list[tuple[slice, HeadsWeights]] = []
        start = 0
        for _, group in groupby(steps, key=_draft_order):
            rows = list(group)
            weights = self._views(self._heads, _heads_of(rows[0]), HeadsWeights.from_buffer)
            groups.append((slice(start, start + len(rows)), weights))
            start += len(rows)
        return groups

    def _head_logits(
        self,
        r_YH: Tensor,
        steps: Sequence[RowStep],
        groups: Sequence[tuple[slice, HeadsWeights]],
    ) -> Iterator[Tensor]:
        """float32 [part of Y, V]: first of all rows that share lm_head, then of each other group.

        steps and groups are in `_draft_order`.
        """
        shared = [step for step in steps if not own_outputs(_heads_of(step).layout)]
        counts = [_heads_of(step).layout.num_heads for step in shared]
        start = sum(counts)
        if shared:
            yield self._decoder.logits(r_YH[:start], self._segments(shared, counts))
        for rows, heads in groups:
            if heads.output_KVH is not None:
                end = start + (rows.stop - rows.start) * heads.num_heads
                yield output_logits(r_YH[start:end], heads.output_KVH)
                start = end


def _heads_of(step: RowStep) -> DeviceAdapter:
    assert step.adapters.heads is not None
    return step.adapters.heads


def _draft_order(step: RowStep) -> tuple[bool, str]:
    """Rows that share lm_head lie side by side, and so do those of one heads digest."""
    heads = _heads_of(step)
    return own_outputs(heads.layout), heads.digest
