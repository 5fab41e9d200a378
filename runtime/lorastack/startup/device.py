"""The device of a server, and what its options are there unless somebody says otherwise."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorastack.config import GIB
from lorastack.errors import InvalidArgumentError, Reason


class DeviceDefaults(NamedTuple):
    """max_rows: running at once. adapter_memory: bytes on the device."""

    max_rows: int
    adapter_memory: int


ON_CPU = DeviceDefaults(32, 2 * GIB)
ON_CUDA = DeviceDefaults(128, 8 * GIB)
MOST_ADAPTERS = 0.1  # of a CUDA device's memory, whatever ON_CUDA says


def find_device(name: str) -> torch.device:
    """The device of --device: auto, cpu or cuda. Raises InvalidArgumentError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "--device cuda: torch finds no CUDA device; use cpu or auto",
            reason=Reason.INVALID_MODEL,
        )
    return torch.device(name)


def device_defaults(device: torch.device) -> DeviceDefaults:
    """What a server takes here: a GPU has more memory, and its steps have room for more rows."""
    if device.type != "cuda":
        return ON_CPU
    total = torch.cuda.get_device_properties(device).total_memory
    return ON_CUDA._replace(adapter_memory=min(ON_CUDA.adapter_memory, int(MOST_ADAPTERS * total)))
