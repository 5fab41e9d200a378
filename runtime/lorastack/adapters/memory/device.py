"""Adapters on a device, and how they get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorastack.adapters.memory.host import PackedAdapter
from lorastack.layout import AdapterLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class DeviceAdapter:
    """An adapter's flat buffer on the device. Valid while pinned.

    Compared by identity, so that views of the buffer can be kept for as long as it lives.
    """

    digest: str
    buffer: Tensor
    layout: AdapterLayout

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @classmethod
    def of(cls, packed: PackedAdapter, buffer: Tensor) -> DeviceAdapter:
        """The adapter of a host copy, its bytes being in `buffer`."""
        return cls(digest=packed.digest, buffer=buffer, layout=packed.layout)


Copy = Callable[[PackedAdapter], DeviceAdapter]  # runs in a thread of its own and may take its time


def device_copy(device: torch.device) -> Copy | None:
    """How host copies get to `device`. None on a CPU: there the host copy itself serves."""
    return None if device.type == "cpu" else partial(_copy, device)


def _copy(device: torch.device, packed: PackedAdapter) -> DeviceAdapter:
    """One contiguous copy; on CUDA on a stream of its own, so that no step waits for it."""
    if device.type != "cuda":
        return DeviceAdapter.of(packed, packed.buffer.to(device))
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        buffer = packed.buffer.to(device, non_blocking=True)
    stream.synchronize()
    return DeviceAdapter.of(packed, buffer)
