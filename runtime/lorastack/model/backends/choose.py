"""What runs a model, decided once and before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.kernels.native.isa import Isa, missing
from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton.launch import why_not
from lorastack.model.backends.native import native_isa
from lorastack.model.backends.parallel.shards import check_shards
from lorastack.model.config import DecoderConfig

TRITON_DTYPES = (torch.bfloat16, torch.float32)
TRITON_HEAD_DIM = 256  # of attention at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """dtype: of weights, KV, LoRAs and heads. kind: what the base model's weights are quantised to.

    native: the native kernels may be used, with no better instruction set than `at_most` if it is
    there. isa: the one with which they run the model. triton: Triton's kernels run it, and `isa` is
    None. Neither: plain torch. why_not_triton: why its kernels do not, "" if they do or nobody
    wants them. shards: devices that share the model.
    """

    device: torch.device
    dtype: torch.dtype
    kind: Kind | None
    native: bool
    at_most: Isa | None
    isa: Isa | None
    shards: int = 1
    triton: bool = False
    why_not_triton: str = ""

    @property
    def lossless(self) -> bool:
        """True if a row's tokens depend neither on the rows beside it nor on drafts.

        Triton's kernels and the native ones make every sum in an order of the row's own. torch does
        not; what that changes in float32 is too little to tell two tokens apart.
        """
        return self.triton or self.isa is not None or self.dtype.itemsize >= 4

    def why_torch(self, name: str) -> str:
        """Why the model `name` runs in plain torch on a CPU although the native kernels may run.

        "" where they do run, may not, or the device is no CPU.
        """
        runs = self.triton or self.isa is not None
        if runs or not self.native or self.device.type != "cpu":
            return ""
        if self.shards > 1:
            return f"--tensor-parallel {self.shards} runs in torch alone"
        return missing(self.dtype) or f"no native kernels run {name} with these options"


def choose(
    config: DecoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    native: bool,
    kind: Kind | None,
    at_most: Isa | None = None,
    shards: int = 1,
    triton: bool | None = False,
) -> Choice:
    """Triton's kernels or the native ones where they run the model and may, else torch.

    dtype: None for bfloat16 where that is lossless, else float32. native: native kernels may run.
    at_most: no better instruction set than it. shards: devices that share the model; more than one
    run it in torch. triton: Triton's kernels may run; None: on a CUDA device alone. Raises
    InvalidArgumentError for what no kernel here can do, and for a model that so many devices cannot
    share.
    """
    if shards > 1:
        check_shards(config.shapes, shards, kind)
    if triton is None:
        triton = device.type == "cuda"
    why = ""
    if triton:
        why = why_no_triton(config, dtype or torch.bfloat16, device, kind, shards)
        triton = not why
    if device.type == "cuda" and kind is not None and not triton:
        raise InvalidArgumentError(
            f"--quantize {kind}: plain torch multiplies no quantised weights on a GPU"
            f"{f', and {why}' if why else ''}; leave it out, take "
            "--dtype bfloat16 for half the memory, or --device cpu",
            reason=Reason.INVALID_MODEL,
        )

    def isa_for(dtype: torch.dtype) -> Isa | None:
        if triton or not native or shards > 1:
            return None
        return native_isa(config, dtype, device, kind, at_most)

    if dtype is None:
        # Plain torch does not keep bfloat16 lossless.
        lossless = triton or isa_for(torch.bfloat16) is not None
        dtype = torch.bfloat16 if lossless else torch.float32
    return Choice(
        device=device,
        dtype=dtype,
        kind=kind,
        native=native,
        at_most=at_most,
        isa=isa_for(dtype),
        shards=shards,
        triton=triton,
        why_not_triton=why,
    )


def why_no_triton(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, kind: Kind | None, shards: int
) -> str:
    """Why Triton's kernels cannot run this model there; "" if they can."""
    if shards > 1:
        return f"--tensor-parallel {shards} runs in torch alone"
    if dtype not in TRITON_DTYPES:
        return f"Triton's kernels compute in bfloat16 and float32, not {dtype}".replace(
            "torch.", ""
        )
    if kind is not None and dtype != torch.bfloat16:
        return "Triton's kernels widen quantised weights to bfloat16 alone"
    size = config.shapes.head_dim
    if size % 2 or size > TRITON_HEAD_DIM:
        return f"Triton's kernels take even head sizes up to {TRITON_HEAD_DIM}, not {size}"
    return why_not(device)
