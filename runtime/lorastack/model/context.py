"""What one forward pass is about. Filled by the runner, read by the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lorastack.kernels.attention import RowSpan
from lorastack.lora.segments import LoraBatch

__all__ = ["ForwardBatch", "Outputs", "RowSpan"]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step: token_ids_T (int64, on the decoder's device), the rows that own its tokens in
    order and without gaps, the LoRA segments over it, and which tokens' results are wanted (their
    places in the step, rising)."""

    token_ids_T: Tensor
    rows: tuple[RowSpan, ...]
    outputs: Sequence[int]
    lora: LoraBatch = field(default_factory=LoraBatch)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step gives for each of the X tokens whose results were wanted.

    hidden_XH: after the final norm. logits_XV: see `Decoder.logits`. peaks_X, best_X: the best
    logit and its token, see `kernels.best`.
    """

    hidden_XH: Tensor
    logits_XV: Tensor
    peaks_X: Tensor
    best_X: Tensor
