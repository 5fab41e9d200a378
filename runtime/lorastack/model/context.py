"""What one forward pass is about. Filled by the runner, read by the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lorastack.kernels.attention import RowSpan
from lorastack.lora.segments import LoraBatch

__all__ = ["ForwardBatch", "RowSpan"]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step: token_ids_T (int64, on the decoder's device), the rows that own its tokens in
    order and without gaps, and the LoRA segments over it."""

    token_ids_T: Tensor
    rows: tuple[RowSpan, ...]
    lora: LoraBatch = field(default_factory=LoraBatch)
