"""The device of a server, and what its options are there unless somebody says otherwise."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorastack.config import CPU_ADAPTERS, CPU_ROWS, GIB
from lorastack.errors import InvalidArgumentError, Reason


class DeviceDefaults(NamedTuple):
    """max_rows: running at once. adapter_memory: bytes on the device."""

    max_rows: int
    adapter_memory: int


ON_CPU = DeviceDefaults(CPU_ROWS, CPU_ADAPTERS)
ON_CUDA = DeviceDefaults(128, 8 * GIB)
MOST_ADAPTERS = 0.1  # of a CUDA device's memory, whatever ON_CUDA says


def find_device(name: str, count: int = 1) -> torch.device:
    """The device of --device: auto, cpu or cuda; of `count` CUDA devices the first.

    Raises InvalidArgumentError if they are not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "--device cuda: torch finds no CUDA device; use cpu or auto",
            reason=Reason.INVALID_MODEL,
        )
    device = torch.device(name)
    if device.type == "cuda" and count > 1 and torch.cuda.device_count() < count:
        raise InvalidArgumentError(
            f"--tensor-parallel {count}: torch finds {torch.cuda.device_count()} CUDA devices; "
            "give no more than that",
            reason=Reason.INVALID_MODEL,
        )
    return device


def device_defaults(device: torch.device) -> DeviceDefaults:
    """What a server takes here: a GPU has more memory, and its steps have room for more rows."""
    if device.type != "cuda":
        return ON_CPU
    total = torch.cuda.get_device_properties(device).total_memory
    return ON_CUDA._replace(adapter_memory=min(ON_CUDA.adapter_memory, int(MOST_ADAPTERS * total)))
