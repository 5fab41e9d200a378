"""Adapters on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lorastack.layout import AdapterLayout

MakeViews = Callable[[str, Tensor, AdapterLayout], object]  # of an adapter's digest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class DeviceAdapter:
    """An adapter's flat buffer on the device, and what steps read of it. Valid while pinned.

    views: what a `MakeViews` made of the buffer at its place, before any step: the engine's own
    business. Compared by identity, so it can be a weak key: an adapter that moves is another one.
    """

    digest: str
    buffer: Tensor
    layout: AdapterLayout
    views: object = None

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


def no_views(digest: str, buffer: Tensor, layout: AdapterLayout) -> None:
    """For adapters that no step reads."""
