"""Packing an adapter's tensors into one flat buffer, and looking at them there.

Contract. The buffer is one 1-D tensor of one dtype; `AdapterLayout` says where each tensor lies.
Runs start on a cache line (`ALIGNMENT` bytes). A run is one tensor, or tensors that one call reads
together and that therefore lie without gaps:

- the A parts of a layer's group, in the group's order: one [sum of ranks, in] matrix;
- the weights of all heads, by head: [K, H, H]; the biases of all heads: [K, H].

Source of the groups and of the alignment: `lorastack.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from lorastack.layout import (
    ALIGNMENT,
    EMBED,
    GROUPS,
    HEADS,
    LM_HEAD,
    NO_LAYER,
    AdapterLayout,
    Part,
    TensorKey,
    TensorSlot,
)


def pack(
    tensors: Mapping[TensorKey, Tensor],
    scales: Mapping[tuple[int, str], float],
    num_heads: int,
    choices: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
) -> tuple[AdapterLayout, Tensor]:
    """Copy `tensors` (any float dtype, on the CPU) into a new flat buffer of `dtype`.

    scales: LoRA scale of every (layer, target) present; num_heads: Medusa heads, 0 for none;
    choices: the heads' own tree. Padding is zero, so equal adapters give equal bytes.
    """
    slots: dict[TensorKey, TensorSlot] = {}
    step = ALIGNMENT // dtype.itemsize
    end = 0
    for run in _runs(tensors, num_heads):
        end = -(-end // step) * step
        for key in run:
            shape = tuple(tensors[key].shape)
            slots[key] = TensorSlot(end, shape)
            end += prod(shape)
    assert slots.keys() == tensors.keys(), f"no place for {tensors.keys() - slots.keys()}"

    buffer = torch.zeros(end, dtype=dtype)
    layout = AdapterLayout(
        slots=slots,
        scales=dict(scales),
        num_elements=end,
        itemsize=dtype.itemsize,
        num_heads=num_heads,
        choices=choices,
    )
    for key, tensor in tensors.items():
        view(buffer, layout, key).copy_(tensor)
    return layout, buffer


def view(buffer: Tensor, layout: AdapterLayout, key: TensorKey) -> Tensor:
    """The tensor `key` inside `buffer`, not copied. KeyError when the adapter has none."""
    slot = layout.slots[key]
    return buffer[slot.offset : slot.offset + prod(slot.shape)].view(slot.shape)


def view_run(buffer: Tensor, layout: AdapterLayout, keys: tuple[TensorKey, ...]) -> Tensor:
    """Gapless neighbours `keys` as one tensor, joined along their first dimension."""
    first, last = layout.slots[keys[0]], layout.slots[keys[-1]]
    end = last.offset + prod(last.shape)
    size = sum(prod(layout.slots[key].shape) for key in keys)
    assert end - first.offset == size, f"{keys} are not neighbours"
    return buffer[first.offset : end].view(-1, *first.shape[1:])


def _runs(tensors: Mapping[TensorKey, Tensor], num_heads: int) -> Iterator[list[TensorKey]]:
    """Present keys in buffer order, grouped into gapless runs."""
    layers = sorted({layer for layer, target, _ in tensors if layer >= 0 and target != HEADS})
    for layer in layers:
        for group in GROUPS:
            present = [target for target in group if (layer, target, Part.A) in tensors]
            if present:
                yield [(layer, target, Part.A) for target in present]
            for target in present:
                yield [(layer, target, Part.B)]
    for target in (EMBED, LM_HEAD):
        if (NO_LAYER, target, Part.A) in tensors:
            yield [(NO_LAYER, target, Part.A)]
            yield [(NO_LAYER, target, Part.B)]
    if num_heads:
        yield [(head, HEADS, Part.WEIGHT) for head in range(num_heads)]
        yield [(head, HEADS, Part.BIAS) for head in range(num_heads)]
