"""What steps read adapters by: views of their buffers, made once an adapter has its place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.kernels.heads import HeadsWeights
from lorastack.layout import HEADS, AdapterLayout, Part
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.speculation.heads import Correction, correction, heads_weights


@dataclass(frozen=True, slots=True)
class AdapterViews:
    """lora: empty for an adapter of heads only. heads: None for one without whole ones.

    private: a private part's correction of other heads.
    """

    lora: LoraWeights
    heads: HeadsWeights | None
    private: Correction | None = None


def make_views(
    backend: Backend, digest: str, buffer: Tensor, layout: AdapterLayout
) -> AdapterViews:
    """Of a buffer, which need not be written yet, and what the backend makes beside them.

    Any thread. What goes to a CUDA device does so in the calling thread's current stream.
    """
    lora = LoraWeights.from_buffer(buffer, layout, digest)
    backend.adopt(lora)
    heads, private = None, None
    if (0, HEADS, Part.A) in layout.slots:
        private = correction(buffer, layout)
    elif layout.num_heads:
        heads = heads_weights(buffer, layout)
    return AdapterViews(lora, heads, private)


def lora_views(adapter: DeviceAdapter) -> LoraWeights:
    """The adapter's LoRA."""
    return _views_of(adapter).lora


def heads_views(adapter: DeviceAdapter) -> HeadsWeights:
    """The heads of an adapter that has whole ones."""
    heads = _views_of(adapter).heads
    assert heads is not None, adapter.digest
    return heads


def private_views(adapter: DeviceAdapter) -> Correction:
    """What an adapter corrects other heads by."""
    private = _views_of(adapter).private
    assert private is not None, adapter.digest
    return private


def _views_of(adapter: DeviceAdapter) -> AdapterViews:
    assert isinstance(adapter.views, AdapterViews), adapter.digest
    return adapter.views
