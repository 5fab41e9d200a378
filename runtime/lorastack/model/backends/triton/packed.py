"""Arrays of several types in one buffer, on host and device: one copy brings them all."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from lorastack.model.backends.triton.device import Device

ALIGNMENT = 16  # bytes
Shape: TypeAlias = tuple[int, ...]
# By name; in the order of the buffer.
Fields: TypeAlias = Mapping[str, tuple[torch.dtype, Shape]]


class Packed:
    """Named arrays, each on the host (numpy, views of one pinned buffer) and on the device.

    The last array may be filled in part: then only its beginning is copied.
    """

    def __init__(self, fields: Fields, device: torch.device, calls: Device) -> None:
        self._calls = calls
        self._starts: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in fields.items():
            self._starts[name] = end
            end += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._host = calls.host_buffer(end)
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        on_host = {name: self._view(self._host, name, *fields[name]) for name in fields}
        self.host: dict[str, NDArray[Any]] = {name: each.numpy() for name, each in on_host.items()}
        self.device: dict[str, Tensor] = {
            name: self._view(self._device, name, *fields[name]) for name in fields
        }
        self._last = list(fields)[-1]

    def _view(self, buffer: Tensor, name: str, dtype: torch.dtype, shape: Shape) -> Tensor:
        start = self._starts[name]
        nbytes = prod(shape) * dtype.itemsize
        return buffer[start : start + nbytes].view(dtype).view(shape)

    def upload(self, last: int) -> None:
        """Enqueues the copy to the device. last: elements of the last array that count."""
        end = self._end(last)
        self._calls.upload(self._host[:end], self._device[:end])

    def download(self, last: int) -> None:
        """Enqueues the copy to the host. last: as in `upload`."""
        end = self._end(last)
        self._calls.download(self._device[:end], self._host[:end])

    def _end(self, last: int) -> int:
        """Bytes up to there in the last array."""
        return self._starts[self._last] + last * self.host[self._last].itemsize


def int_fields(shapes: Mapping[str, Shape]) -> Fields:
    """Fields of int32."""
    return {name: (torch.int32, shape) for name, shape in shapes.items()}
