"""Adapters on a device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorastack.adapters.memory.host import PackedAdapter
from lorastack.layout import AdapterLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class DeviceAdapter:
    """An adapter's flat buffer on the device. Valid while pinned.

    Compared by identity, so that views of the buffer can be kept for as long as it lives: an
    adapter that moves on the device is another one.
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
