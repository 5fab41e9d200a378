"""What each row's heads propose for its next step. Y in shapes: all (row, head) pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, islice
from weakref import WeakKeyDictionary

from torch import Tensor

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.engine.batch import RowHeads, RowStep
from lorastack.engine.stacks import lay_out_loras
from lorastack.engine.views import heads_views, private_views
from lorastack.kernels.heads import HeadsGroup, HeadsWeights, TopTokens
from lorastack.layout import LM_HEAD, NO_LAYER, Part
from lorastack.model.backends.base import Backend
from lorastack.model.context import HeadsAsk
from lorastack.speculation.heads import own_outputs
from lorastack.speculation.proposal import Proposal


class Proposer:
    """Asks heads. Keeps what a private part makes of the heads that it corrects."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # By private part, then by the heads that it corrects: either may move on the device.
        self._corrected: WeakKeyDictionary[
            DeviceAdapter, WeakKeyDictionary[DeviceAdapter, HeadsWeights]
        ] = WeakKeyDictionary()

    def ask(self, step: RowStep) -> HeadsAsk | None:
        """What the row asks of heads that stand alone, for the backend to answer."""
        if not step.num_candidates or not _stand_alone(step):
            return None
        return HeadsAsk(self._weights(_heads_of(step)), step.num_candidates)

    def propose(
        self,
        steps: Sequence[RowStep],
        last: Sequence[int],
        hidden_XH: Tensor,
        drafted: Sequence[TopTokens | None] = (),
    ) -> tuple[list[Proposal | None], list[str]]:
        """What every row's heads propose at its last accepted token, None for a row that asks for
        no candidates or whose heads fail; and the digests of heads that fail, once a row.

        Heads fail that make NaN or infinity of a finite state; a state that is not finite blames no
        heads. last: the places of these tokens in hidden_XH, one a step. drafted: what the backend
        has answered already, one a step or ().
        """
        proposals: list[Proposal | None] = [None] * len(steps)
        failed: list[str] = []

        def take(i: int, proposal: Proposal) -> None:
            if _is_sound(proposal):
                proposals[i] = proposal
            elif hidden_XH[last[i]].isfinite().all():
                failed.append(_heads_of(steps[i]).digest)

        answered = {i: top for i, top in enumerate(drafted) if top is not None}
        for i, top in answered.items():
            take(i, Proposal(*(tuple(map(tuple, each_KR.tolist())) for each_KR in top)))
        wanting = sorted(
            (i for i, step in enumerate(steps) if step.num_candidates and i not in answered),
            key=lambda i: _heads_order(steps[i]),
        )
        for alone, places in groupby(wanting, key=lambda i: _stand_alone(steps[i])):
            chosen = list(places)
            rows = [steps[i] for i in chosen]
            ask = self._propose if alone else self._propose_with_lm_head
            top = ask(hidden_XH[[last[i] for i in chosen]], rows)
            ids, logprobs = (iter(map(tuple, each_YR.tolist())) for each_YR in top)
            for i, step in zip(chosen, rows, strict=True):
                num_heads = _heads_of(step).num_heads
                take(i, Proposal(tuple(islice(ids, num_heads)), tuple(islice(logprobs, num_heads))))
        return proposals, failed

    def _propose(self, hidden_BH: Tensor, steps: Sequence[RowStep]) -> TopTokens:
        """The best tokens of every (row, head), all in one call."""
        return self._backend.ops.propose(hidden_BH, self._groups(steps), _most_candidates(steps))

    def _propose_with_lm_head(self, hidden_BH: Tensor, steps: Sequence[RowStep]) -> TopTokens:
        """The same through lm_head and the rows' LoRAs of it: a second pass over (rows x heads)."""
        r_YH = self._backend.ops.states(hidden_BH, self._groups(steps))
        counts = [_heads_of(step).num_heads for step in steps]
        logits_YV = self._backend.logits(r_YH, lay_out_loras(steps, counts))
        return self._backend.ops.top(logits_YV, _most_candidates(steps))

    def _groups(self, steps: Sequence[RowStep]) -> list[HeadsGroup]:
        """One group for each run of neighbouring rows with the same heads."""
        groups: list[HeadsGroup] = []
        start = 0
        for _, group in groupby(steps, key=_heads_order):
            rows = list(group)
            end = start + len(rows)
            groups.append(HeadsGroup(start, end, self._weights(_heads_of(rows[0]))))
            start = end
        return groups

    def _weights(self, heads: RowHeads) -> HeadsWeights:
        whole, part = heads.whole, heads.private
        if part is None:
            return heads_views(whole)
        corrected = self._corrected.setdefault(part, WeakKeyDictionary())
        if whole not in corrected:
            corrected[whole] = private_views(part).of(heads_views(whole))
        return corrected[whole]


def _heads_of(step: RowStep) -> RowHeads:
    assert step.adapters.heads is not None
    return step.adapters.heads


def _is_sound(proposal: Proposal) -> bool:
    """One logit that is not finite spoils all log-probabilities of its head."""
    return not any(math.isnan(logprobs[0]) for logprobs in proposal.logprobs)


def _stand_alone(step: RowStep) -> bool:
    """True if the heads' buffer holds what this row's heads choose from.

    Version 2 heads choose through lm_head where it has no rows of their own or a LoRA adapts it.
    """
    heads = _heads_of(step)
    if own_outputs(heads.whole.layout):
        return True
    adapted = any((NO_LAYER, LM_HEAD, Part.A) in lora.layout.slots for lora in step.adapters.loras)
    return heads.has_draft_vocabulary and not adapted


def _heads_order(step: RowStep) -> tuple[bool, str, str]:
    """Sorts rows of one call side by side, among them those that share matrices, and then those
    with the same heads."""
    heads = _heads_of(step)
    return _stand_alone(step), heads.whole.digest, heads.digest


def _most_candidates(steps: Sequence[RowStep]) -> int:
    return max(step.num_candidates for step in steps)
