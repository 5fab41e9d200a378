"""What runs a model, decided once and before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.kernels.native.isa import Isa, missing
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.native import native_isa
from lorastack.model.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """dtype: of weights, KV, LoRAs and heads. kind: what the base model's weights are quantised to.

    native: the native kernels may be used, with no better instruction set than `at_most` if it is
    there. isa: the one with which they run the model; None for plain torch.
    """

    device: torch.device
    dtype: torch.dtype
    kind: Kind | None
    native: bool
    at_most: Isa | None
    isa: Isa | None

    @property
    def lossless(self) -> bool:
        """True if a row's tokens depend neither on the rows beside it nor on drafts.

        The native kernels make every sum in an order of the row's own. torch does not; what that
        changes in float32 is too little to tell two tokens apart.
        """
        return self.isa is not None or self.dtype.itemsize >= 4

    def why_torch(self, name: str) -> str:
        """Why the model `name` runs in plain torch on a CPU although the native kernels may run.

        "" where they do run, may not, or the device is no CPU.
        """
        if self.isa is not None or not self.native or self.device.type != "cpu":
            return ""
        return missing(self.dtype) or f"no native kernels run {name} with these options"


def choose(
    config: DecoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    native: bool,
    kind: Kind | None,
    at_most: Isa | None = None,
) -> Choice:
    """The native kernels where they run the model and may (`native`), else torch.

    dtype: None for bfloat16 where that is lossless, else float32. at_most: no better instruction
    set than it. Raises InvalidArgumentError for what no kernel here can do.
    """
    if device.type == "cuda" and kind is not None:
        raise InvalidArgumentError(
            f"--quantize {kind}: no kernel multiplies quantised weights on a GPU yet; leave it "
            "out, take --dtype bfloat16 for half the memory, or --device cpu",
            reason=Reason.INVALID_MODEL,
        )

    def isa_for(dtype: torch.dtype) -> Isa | None:
        return native_isa(config, dtype, device, kind, at_most) if native else None

    if dtype is None:
        # The native kernels alone keep bfloat16 lossless, and they run on a CPU. A backend that
        # does on another device is chosen here.
        dtype = torch.float32 if isa_for(torch.bfloat16) is None else torch.bfloat16
    return Choice(
        device=device,
        dtype=dtype,
        kind=kind,
        native=native,
        at_most=at_most,
        isa=isa_for(dtype),
    )
