"""The decoder: tokens in, hidden states and logits out, everything as an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorastack.kernels.linear import pack_dense
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch
from lorastack.model.backend import TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache
from lorastack.model.native import NativeBackend, native_isa
from lorastack.model.weights import load_weights


class Backend(Protocol):
    """What runs a model's weights. Holds no state of a request."""

    name: str

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Outputs: ...
    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor: ...
    def head_rows(self, ids_N: Tensor, out_NH: Tensor) -> None: ...


class Decoder:
    """A base model and the backend that runs it."""

    def __init__(
        self, shapes: ModelShapes, backend: Backend, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shapes = shapes
        self.device = device
        self.dtype = dtype
        self._backend = backend

    @property
    def backend(self) -> str:
        return self._backend.name

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Outputs:
        """Results of the tokens that the batch asks for. Writes all its keys and values to `kv`."""
        return self._backend.forward(batch, kv)

    @torch.no_grad()
    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """[X, V] of states after the final norm: float32, or float64 of a float64 model.

        The segments index the X rows.
        """
        return self._backend.logits(hidden_XH, lora)

    @torch.no_grad()
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
    """Load a Hugging Face folder. InvalidArgumentError names what is not supported.

    dtype None: bfloat16, on a CPU only where the native kernels run it, else float32. native: use
    them where they run.
    """
    config = load_config(path, max_context)
    if dtype is None:
        native_here = native and native_isa(config, torch.bfloat16, device) is not None
        dtype = torch.bfloat16 if native_here or device.type != "cpu" else torch.float32
    backend = _backend(Checkpoint(path), config, device, dtype, native)
    return Decoder(config.shapes, backend, device, dtype)


def _backend(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    native: bool,
) -> Backend:
    isa = native_isa(config, dtype, device) if native else None
    if isa is not None:
        return NativeBackend.load(checkpoint, config, dtype, isa)
    weights = load_weights(
        checkpoint, config, device=device, dtype=dtype, pack=pack_dense, pack_pair=pack_dense
    )
    return TorchBackend(config, weights, device, dtype)


def fingerprint(path: Path) -> str:
    """sha256 over the model's shapes and its checkpoint's digest: two servers with the same one
    run the same weights. Reads a few KiB a tensor."""
    shapes = asdict(load_config(path, None).shapes)
    sha = hashlib.sha256(repr(sorted(shapes.items())).encode())
    sha.update(Checkpoint(path).digest())
    return f"sha256:{sha.hexdigest()}"
