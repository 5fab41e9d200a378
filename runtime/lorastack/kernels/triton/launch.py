"""How kernels are launched, and whether a device can run them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import torch

# As Triton reads it, once a process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix instructions
# A product that is fused with a sum in one place and not in another has other bits; Triton's own
# default differs by version.
OPTIONS = {"enable_fp_fusion": False}


class Kernel(Protocol):
    """A function under `triton.jit`."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any: ...


def launch(kernel: Kernel, grid: Sequence[int], *args: object, **settings: object) -> None:
    """Enqueues one launch on the current stream. settings: constants, num_warps and num_stages."""
    kernel[tuple(grid)](*args, **settings, **OPTIONS)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size; triton.cdiv is as slow as a launch."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The next one, at least the size."""
    return 1 << (size - 1).bit_length()


def float_bits(value: float) -> int:
    """The int64 with a float64's bits, for arrays of integers."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    assert isinstance(bits, int)
    return bits


def why_not(device: torch.device) -> str:
    """Why Triton's kernels cannot run there, with the remedy; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "the device has compute capability {}.{}; 8.0 is the least".format(*capability)
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton finds no C compiler (Debian: apt-get install gcc libc6-dev)"
    return ""
