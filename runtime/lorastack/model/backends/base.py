"""What a backend is: everything that the engine asks of the machine that runs a model.

A step is one call, `forward`. It gets plain values and gives the tokens that most rows take beside
tensors that may stay on the device, so that a backend can run the step from static buffers, with
one copy to the device and one back. The bulk of the rest goes through `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorastack.kernels.ops import Ops
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch
from lorastack.lora.weights import LoraWeights
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache


class Backend(Protocol):
    """A base model on a device. Holds no state of a request. Only `head_rows` and `adopt` are
    thread-safe.

    name: the kind of backend and its instructions. quantization: its weights' `Kind`, or "".
    dynamic_rope_begin: see `DecoderConfig`. overlaps: the device works on a step by itself, while
    the host does something else.
    """

    name: str
    shapes: ModelShapes
    device: torch.device
    dtype: torch.dtype
    quantization: str
    dynamic_rope_begin: int | None
    overlaps: bool
    ops: Ops

    def make_kv(self, num_pages: int, page_size: int) -> KVCache:
        """Room for keys and values in the form that `forward` reads."""
        ...

    def prepare(self, kv: KVCache) -> None:
        """Once, before anybody owns a page: gets ready what would hold up early steps."""
        ...

    def forward(
        self, batch: ForwardBatch, kv: KVCache, meanwhile: Callable[[], None] | None = None
    ) -> Outputs:
        """Runs a step. Writes the keys and values of all its tokens to `kv`.

        Ends when the device is done with it, so that a step can be timed. A backend that samples on
        its device may also move those of accepted nodes and ask heads that stand alone, and says so
        in `Outputs`: then a step needs one copy in and one back.

        meanwhile: other work of the host, which raises nothing. Called once, when all of the step
        is enqueued and before the wait for it, by a backend that `overlaps`; by others never.
        """
        ...

    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """[X, V] of states after the final norm: float32, or float64 of a float64 model.

        The segments index the X rows.
        """
        ...

    def head_rows(self, ids: Sequence[int], out_NH: Tensor) -> None:
        """Writes lm_head's rows of these tokens into a tensor on the CPU or `device`. Any thread.

        On a CUDA device in the calling thread's current stream, for whose end nobody need wait.
        """
        ...

    def adopt(self, lora: LoraWeights) -> None:
        """Makes what steps read of a LoRA beside its tensors, which may not be written yet; else
        the first step with it does. Any thread, streams as in `head_rows`.

        It lasts as long as `lora`, which lives until steps with it have ended.
        """
        ...
