"""The decoder: tokens in, hidden states and logits out, everything as an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorastack.kernels.linear import pack_dense
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch
from lorastack.model.backends.native import NativeBackend, native_isa
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.fetch.download import Progress
from lorastack.model.kv import KVCache
from lorastack.model.weights import Packing, load_weights, untie


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
    progress: Progress | None = None,
) -> Decoder:
    """Load a Hugging Face folder. InvalidArgumentError names what is not supported.

    dtype: None for `default_dtype`. native: use the native kernels where they run. quantize: store
    the weights as a `Kind`; the native kernels multiply them in bfloat16 only. progress: gets bytes
    of the checkpoint.
    """
    config = load_config(path, max_context)
    checkpoint = Checkpoint(path, progress)
    config = untie(config, checkpoint)
    dtype = dtype or default_dtype(config, device, native)
    kind = None if quantize is None else Kind(quantize)
    backend = _backend(checkpoint, config, device, dtype, native, kind)
    begin = config.dynamic_rope_begin
    return Decoder(config.shapes, backend, device, dtype, quantize or "", begin)


def default_dtype(config: DecoderConfig, device: torch.device, native: bool) -> torch.dtype:
    """bfloat16, on a CPU only where the native kernels run it and may (`native`), else float32."""
    native_here = native and native_isa(config, torch.bfloat16, device) is not None
    return torch.bfloat16 if native_here or device.type != "cpu" else torch.float32


def _backend(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    native: bool,
    kind: Kind | None,
) -> Backend:
    isa = native_isa(config, dtype, device, kind) if native else None
    if isa is not None:
        return NativeBackend.load(checkpoint, config, dtype, isa, kind)
    dense = partial(pack_dense, kind=kind)
    head = partial(pack_dense, kind=head_kind(kind))
    packing = Packing(dense, pair=dense, head=head, copies=kind is not None)
    weights = load_weights(checkpoint, config, device=device, dtype=dtype, packing=packing)
    return TorchBackend(config, weights, device, dtype)


def fingerprint(path: Path) -> str:
    """sha256 over the model's shapes and its checkpoint's digest: two servers with the same one
    run the same weights. Reads a few KiB a tensor."""
    shapes = asdict(load_config(path, None).shapes)
    sha = hashlib.sha256(repr(sorted(shapes.items())).encode())
    sha.update(Checkpoint(path).digest())
    return f"sha256:{sha.hexdigest()}"
