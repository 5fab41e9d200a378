"""The decoder: tokens in, hidden states and logits out, everything as an argument."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorastack.kernels.linear import pack_dense
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch
from lorastack.model.backends.choose import Choice, choose
from lorastack.model.backends.native import NativeBackend
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache
from lorastack.model.weights import Packing, check_tensors, load_weights, untie


class Backend(Protocol):
    """What runs a model's weights. Holds no state of a request."""

    name: str

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Outputs: ...
    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor: ...
    def head_rows(self, ids_N: Tensor, out_NH: Tensor) -> None: ...


class Decoder:
    """A base model and the backend that runs it. quantization: its weights' `Kind`, or "".

    dynamic_rope_begin: see `DecoderConfig`.
    """

    def __init__(
        self,
        shapes: ModelShapes,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "",
        dynamic_rope_begin: int | None = None,
    ) -> None:
        self.shapes = shapes
        self.device = device
        self.dtype = dtype
        self.quantization = quantization
        self.dynamic_rope_begin = dynamic_rope_begin
        self._backend = backend

    @property
    def backend(self) -> str:
        return self._backend.name

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Outputs:
        """Results of the tokens that the batch asks for. Writes all its keys and values to `kv`."""
        return self._backend.forward(batch, kv)

    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """[X, V] of states after the final norm: float32, or float64 of a float64 model.

        The segments index the X rows.
        """
        return self._backend.logits(hidden_XH, lora)

    def head_rows(self, ids: Sequence[int], out_NH: Tensor) -> None:
        """lm_head's rows of these tokens into a tensor on the CPU. Any thread."""
        self._backend.head_rows(torch.tensor(ids), out_NH)


def load_decoder(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    max_context: int | None,
    native: bool = True,
    quantize: str | None = None,
) -> Decoder:
    """Load a Hugging Face folder: config.json, the choice of `choose`, and the weights.

    quantize: a `Kind`. Raises InvalidArgumentError naming what is not supported.
    """
    config = load_config(path, max_context)
    kind = None if quantize is None else Kind(quantize)
    choice = choose(config, device=device, dtype=dtype, native=native, kind=kind)
    return read_decoder(Checkpoint(path), config, choice)


def read_decoder(checkpoint: Checkpoint, config: DecoderConfig, choice: Choice) -> Decoder:
    """Read the weights into what was chosen.

    Raises InvalidArgumentError naming a tensor: before any is read if it is missing, misshapen, of
    another dtype or not known; when it is its turn if it cannot be quantised.
    """
    check_tensors(checkpoint, config)
    config = untie(config, checkpoint)
    backend = _backend(checkpoint, config, choice)
    quantization = "" if choice.kind is None else choice.kind.value
    begin = config.dynamic_rope_begin
    return Decoder(config.shapes, backend, choice.device, choice.dtype, quantization, begin)


def _backend(checkpoint: Checkpoint, config: DecoderConfig, choice: Choice) -> Backend:
    device, dtype, kind = choice.device, choice.dtype, choice.kind
    if choice.isa is not None:
        return NativeBackend.load(checkpoint, config, dtype, choice.isa, kind)
    dense = partial(pack_dense, kind=kind)
    head = partial(pack_dense, kind=head_kind(kind))
    packing = Packing(dense, pair=dense, head=head, copies=kind is not None)
    weights = load_weights(checkpoint, config, device=device, dtype=dtype, packing=packing)
    return TorchBackend(config, weights, device, dtype)
