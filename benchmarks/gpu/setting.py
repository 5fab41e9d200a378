"""Where a stage runs, and how large: a CUDA device, or a CPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorastack.adapters.memory.stream import Streams, device_streams
from lorastack.kernels.triton.launch import INTERPRETED, why_not
from lorastack.layout import ModelShapes
from tests.helpers import interpreter
from tests.helpers.shapes import MISTRAL_7B
from tests.helpers.streams import FakeDevice

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MISTRAL = replace(MISTRAL_7B, vocab_size=32768, max_context=16384)
SMALL = ModelShapes(
    architecture="MistralForCausalLM",
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=4096,
    max_context=4096,
    tie_word_embeddings=False,
)
TINY = ModelShapes(
    architecture="MistralForCausalLM",
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=280,
    max_context=256,
    tie_word_embeddings=False,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """tiny: sizes for the interpreter, or for a first look. notes: to be kept beside findings."""

    device: torch.device
    tiny: bool
    notes: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def here(cls, tiny: bool) -> Setting:
        """Of this process, which must not have launched anything. Raises RuntimeError without a
        device that serves."""
        device = torch.device("cpu" if INTERPRETED else "cuda")
        if INTERPRETED:
            interpreter.mend()
        elif not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device; TRITON_INTERPRET=1 does without")
        elif why := why_not(device):
            raise RuntimeError(why)
        return cls(device, tiny or INTERPRETED)

    @property
    def on_device(self) -> bool:
        """Times mean something."""
        return self.device.type == "cuda"

    def goal(self, number: float | None) -> float | None:
        """What is expected of a time, or of what is made of it: nothing at tiny sizes."""
        return None if self.tiny else number

    @property
    def streams(self) -> Streams:
        """For copies and steps. In the interpreter each gets on a little whenever it is asked."""
        return device_streams(self.device) or FakeDevice(lazy=True).streams

    @property
    def name(self) -> str:
        """Of the device."""
        if not self.on_device:
            return "Triton's interpreter on a CPU"
        return torch.cuda.get_device_name(self.device)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of which a stage of bits tells: at tiny sizes only the one in which bits are lost."""
        return {"bfloat16": torch.bfloat16} if self.tiny else DTYPES

    @property
    def mistral(self) -> ModelShapes:
        """Of the model that is meant."""
        return TINY if self.tiny else MISTRAL

    @property
    def small(self) -> ModelShapes:
        """Of one that runs many steps in little time."""
        return TINY if self.tiny else SMALL

    def wait(self) -> None:
        """Until the device has done all; raises what it met."""
        if self.on_device:
            torch.cuda.synchronize(self.device)

    def is_broken(self) -> bool:
        """True if the device takes no more work from this process."""
        try:
            self.wait()
        except RuntimeError:
            return True
        return False

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal."""
        return torch.randn(shape, device=self.device).to(dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """NaN everywhere."""
        return torch.full(shape, torch.nan, dtype=dtype, device=self.device)

    def ints(self, *values: int) -> Tensor:
        """int32 [values] on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)
