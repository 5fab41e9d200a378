"""What each row's heads propose for its next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from weakref import WeakKeyDictionary

from torch import Tensor

from lorastack.adapters.device import DeviceAdapter
from lorastack.engine.batch import Draft, RowStep
from lorastack.engine.stacks import Stacks
from lorastack.model.decoder import Decoder
from lorastack.speculation.heads import (
    HeadsWeights,
    apply_heads,
    output_logits,
    own_outputs,
    top_candidates,
)


class Drafter:
    """Views into heads' buffers, made once while they are on the device; borrows the rest."""

    def __init__(self, decoder: Decoder, stacks: Stacks) -> None:
        self._decoder = decoder
        self._stacks = stacks
        self._views: WeakKeyDictionary[DeviceAdapter, HeadsWeights] = WeakKeyDictionary()

    def draft(
        self, steps: Sequence[RowStep], last: Sequence[int], hidden_XH: Tensor
    ) -> list[Draft | None]:
        """Every row's heads at its last accepted token, as one operation over the batch.

        last: where in hidden_XH each step's is. None for a row that asks for no candidates.

        For heads without output matrices it costs a second lm_head pass over (rows x heads),
        through the row's LoRA if that adapts lm_head.
        """
        drafts: list[Draft | None] = [None] * len(steps)
        drafting = sorted(
            (i for i, step in enumerate(steps) if step.num_candidates),
            key=lambda i: _draft_order(steps[i]),
        )
        if not drafting:
            return drafts
        rows = [steps[i] for i in drafting]
        groups = self._groups(rows)
        r_YH = apply_heads(hidden_XH[[last[i] for i in drafting]], groups)
        num = max(step.num_candidates for step in rows)
        ranks = (
            tuple(ids)
            for logits_YV in self._logits(r_YH, rows, groups)
            for ids in top_candidates(logits_YV, num).tolist()
        )
        for i, step in zip(drafting, rows, strict=True):
            drafts[i] = tuple(islice(ranks, _heads_of(step).layout.num_heads))
        return drafts

    def _groups(self, steps: Sequence[RowStep]) -> list[tuple[slice, HeadsWeights]]:
        """Neighbouring rows of one heads digest, and these heads."""
        groups: list[tuple[slice, HeadsWeights]] = []
        start = 0
        for _, group in groupby(steps, key=_draft_order):
            rows = list(group)
            weights = self._weights(_heads_of(rows[0]))
            groups.append((slice(start, start + len(rows)), weights))
            start += len(rows)
        return groups

    def _weights(self, heads: DeviceAdapter) -> HeadsWeights:
        if heads not in self._views:
            self._views[heads] = HeadsWeights.from_buffer(heads.buffer, heads.layout)
        return self._views[heads]

    def _logits(
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
            yield self._decoder.logits(r_YH[:start], self._stacks.segments(shared, counts))
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
