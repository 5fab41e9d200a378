"""Where an adapter's tensors lie in its one flat buffer, and views of them there.

Contract. The buffer is one 1-D tensor of one dtype; `AdapterLayout` says where each tensor lies.
Runs start on a cache line (`ALIGNMENT` bytes). A run is one tensor, or several that one call reads
together and that lie without gaps:

- the A parts of a layer's group, in the group's order: one [sum of ranks, in] matrix;
- the weights of all heads' blocks, by block, then head: [L, K, H, H]; their biases: [L, K, H];
- the output matrices of version 1 heads, by head: [K, V, H];
- the A parts of a private part of heads, by block, then head: [L, K, R, H]; its B parts:
  [L, K, H, R];
- the base lm_head's rows of a draft vocabulary: [N, H].

Source of the groups and of the alignment: `lorastack.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from lorastack.layout import (
    ALIGNMENT,
    DRAFT_KEY,
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

UNIT = (
    256  # bytes; a buffer to be copied has a multiple, so that neighbours in an arena are aligned
)


def allocate(
    shapes: Mapping[TensorKey, tuple[int, ...]],
    scales: Mapping[tuple[int, str], float],
    num_heads: int,
    draft_vocabulary: tuple[int, ...] = (),
    *,
    dtype: torch.dtype,
    empty: Callable[[int, torch.dtype], Tensor] | None = None,
) -> tuple[AdapterLayout, Tensor]:
    """The layout and a buffer on the CPU for tensors of these shapes, still to be written.

    scales: LoRA scale of every (layer, target) present; num_heads: Medusa heads, 0 for none;
    draft_vocabulary: the tokens they choose from, () for all. Padding is zero already, so equal
    adapters give equal bytes.

    empty: makes the buffer if the device has a copy of it, for which the layout is then: a multiple
    of UNIT bytes. The base's rows of a draft vocabulary come last and only in the copy.
    """
    slots: dict[TensorKey, TensorSlot] = {}
    padding: list[slice] = []
    step = ALIGNMENT // dtype.itemsize
    end = 0
    for run in _runs(shapes):
        start = -(-end // step) * step
        padding.append(slice(end, start))
        end = start
        for key in run:
            slots[key] = TensorSlot(end, shapes[key])
            end += prod(shapes[key])
    assert slots.keys() == shapes.keys(), f"no place for {shapes.keys() - slots.keys()}"

    if empty is None:
        buffer = torch.empty(end, dtype=dtype)
    else:
        unit = UNIT // dtype.itemsize
        padding.append(slice(end, -(-end // unit) * unit))
        end = padding[-1].stop
        buffer = empty(slots[DRAFT_KEY].offset if DRAFT_KEY in slots else end, dtype)
    for gap in padding:
        buffer[gap] = 0
    layout = AdapterLayout(
        slots=slots,
        scales=dict(scales),
        num_elements=end,
        itemsize=dtype.itemsize,
        num_heads=num_heads,
        draft_vocabulary=draft_vocabulary,
    )
    return layout, buffer


def view(buffer: Tensor, layout: AdapterLayout, key: TensorKey) -> Tensor:
    """A view of the tensor `key` in `buffer`. Raises KeyError if the adapter has none."""
    slot = layout.slots[key]
    return buffer[slot.offset : slot.offset + prod(slot.shape)].view(slot.shape)


def view_run(buffer: Tensor, layout: AdapterLayout, keys: tuple[TensorKey, ...]) -> Tensor:
    """A view of the neighbours `keys` as one tensor, joined along their first dimension."""
    first, last = layout.slots[keys[0]], layout.slots[keys[-1]]
    end = last.offset + prod(last.shape)
    size = sum(prod(layout.slots[key].shape) for key in keys)
    assert end - first.offset == size, f"{keys} are not neighbours"
    return buffer[first.offset : end].view(-1, *first.shape[1:])


def _runs(keys: Collection[TensorKey]) -> Iterator[list[TensorKey]]:
    """Present keys in buffer order, grouped into gapless runs."""
    layers = sorted({layer for layer, target, _ in keys if layer >= 0 and target != HEADS})
    for layer in layers:
        for group in GROUPS:
            present = [target for target in group if (layer, target, Part.A) in keys]
            if present:
                yield [(layer, target, Part.A) for target in present]
            for target in present:
                yield [(layer, target, Part.B)]
    for target in (EMBED, LM_HEAD):
        if (NO_LAYER, target, Part.A) in keys:
            yield [(NO_LAYER, target, Part.A)]
            yield [(NO_LAYER, target, Part.B)]
    for part in (Part.A, Part.B, Part.WEIGHT, Part.BIAS, Part.OUTPUT, Part.DRAFT):
        if run := sorted(key for key in keys if key[1:] == (HEADS, part)):
            yield run
