"""From a model's folder to the backend that runs it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from lorastack.kernels.ops import Ops, fastest_ops
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.base import Backend
from lorastack.model.backends.native import NativeBackend, native_isa
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.fetch.download import Progress
from lorastack.model.weights import untie


def load_decoder(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    max_context: int | None,
    native: bool = True,
    quantize: str | None = None,
    progress: Progress | None = None,
) -> Backend:
    """Load a Hugging Face folder. InvalidArgumentError names what is not supported.

    dtype: None for `default_dtype`. native: use the native kernels where they run; False: all in
    torch, as the reference does. quantize: store the weights as a `Kind`; the native kernels
    multiply them in bfloat16 only. progress: gets bytes of the checkpoint.
    """
    config = load_config(path, max_context)
    checkpoint = Checkpoint(path, progress)
    config = untie(config, checkpoint)
    dtype = dtype or default_dtype(config, device, native)
    kind = None if quantize is None else Kind(quantize)
    return _backend(checkpoint, config, device, dtype, native, kind)


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
    ops = fastest_ops(dtype, config.shapes.hidden_size, device) if native else Ops()
    return TorchBackend.load(checkpoint, config, device, dtype, ops, kind)


def fingerprint(path: Path) -> str:
    """sha256 over the model's shapes and its checkpoint's digest: two servers with the same one
    run the same weights. Reads a few KiB a tensor."""
    shapes = asdict(load_config(path, None).shapes)
    sha = hashlib.sha256(repr(sorted(shapes.items())).encode())
    sha.update(Checkpoint(path).digest())
    return f"sha256:{sha.hexdigest()}"
