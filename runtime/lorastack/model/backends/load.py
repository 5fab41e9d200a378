"""From a model's folder to the backend that runs it."""

from __future__ import annotations

from pathlib import Path

import torch

from lorastack.kernels.native.isa import Isa
from lorastack.kernels.ops import Ops, fastest_ops
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.base import Backend
from lorastack.model.backends.choose import Choice, choose
from lorastack.model.backends.exact import ask_for_exact_sums
from lorastack.model.backends.native import NativeBackend
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.weights import check_tensors, untie


def load_backend(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    max_context: int | None,
    native: bool = True,
    quantize: str | None = None,
    at_most: Isa | None = None,
    triton: bool | None = False,
) -> Backend:
    """Load a Hugging Face folder: config.json, the choice of `choose`, and the weights.

    native: False for all in torch, as the reference does it. quantize: a `Kind`. at_most: the best
    instruction set that may be used. triton: see `choose`. Raises InvalidArgumentError naming what
    is not supported.
    """
    config = load_config(path, max_context)
    kind = None if quantize is None else Kind(quantize)
    choice = choose(
        config,
        device=device,
        dtype=dtype,
        native=native,
        kind=kind,
        at_most=at_most,
        triton=triton,
    )
    return read_backend(Checkpoint(path), config, choice)


def read_backend(checkpoint: Checkpoint, config: DecoderConfig, choice: Choice) -> Backend:
    """Read the weights into what was chosen.

    Raises InvalidArgumentError naming a tensor: before any is read if it is missing, misshapen, of
    another dtype or not known; when it is its turn if it cannot be quantised.
    """
    check_tensors(checkpoint, config)
    config = untie(config, checkpoint)
    device, dtype, kind = choice.device, choice.dtype, choice.kind
    if device.type == "cuda":
        ask_for_exact_sums()
    if choice.triton:
        # Triton is there where it was chosen, and need not be elsewhere.
        from lorastack.model.backends.triton.backend import TritonBackend

        return TritonBackend.load(checkpoint, config, device, dtype, kind)
    if choice.isa is not None:
        return NativeBackend.load(checkpoint, config, dtype, choice.isa, kind)
    ops = Ops()
    if choice.native:
        ops = fastest_ops(dtype, config.shapes.hidden_size, device, choice.at_most)
    return TorchBackend.load(checkpoint, config, device, dtype, ops, kind)
