"""The flat buffer: nothing lost, everything where the layout says, runs aligned and gapless."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.packing import UNIT, allocate, view, view_run
from lorastack.layout import (
    ALIGNMENT,
    DRAFT_KEY,
    EMBED,
    GROUPS,
    HEADS,
    LAYER_TARGETS,
    LM_HEAD,
    NO_LAYER,
    AdapterLayout,
    Part,
    TensorKey,
    head_block,
)
from tests.helpers.packed import pack

DTYPES = (torch.float32, torch.bfloat16)


def adapter(
    targets: list[tuple[int, str]],
    ranks: list[int],
    num_heads: int,
    num_blocks: int = 1,
    outputs: bool = False,
) -> dict[TensorKey, Tensor]:
    """Random tensors with inputs of 5, outputs of 7, heads of 6 (their outputs of 9)."""
    tensors: dict[TensorKey, Tensor] = {}
    for (layer, target), rank in zip(targets, ranks, strict=True):
        tensors[layer, target, Part.A] = torch.randn(rank, 5)
        tensors[layer, target, Part.B] = torch.randn(7, rank)
    for head in range(num_heads):
        for block in range(num_blocks):
            layer = head_block(head, block, num_heads)
            tensors[layer, HEADS, Part.WEIGHT] = torch.randn(6, 6)
            tensors[layer, HEADS, Part.BIAS] = torch.randn(6)
        if outputs:
            tensors[head, HEADS, Part.OUTPUT] = torch.randn(9, 6)
    return tensors


PLACES = [(layer, target) for layer in (0, 3) for target in LAYER_TARGETS]
PLACES += [(NO_LAYER, EMBED), (NO_LAYER, LM_HEAD)]


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[TensorKey, Tensor], int]:
    targets = draw(st.lists(st.sampled_from(PLACES), unique=True, max_size=8))
    ranks = draw(st.lists(st.integers(1, 9), min_size=len(targets), max_size=len(targets)))
    num_heads = draw(st.integers(0, 3))
    return adapter(
        targets, ranks, num_heads, draw(st.integers(1, 3)), draw(st.booleans())
    ), num_heads


@settings(deadline=None)
@given(adapters(), st.sampled_from(DTYPES))
def test_every_tensor_comes_back(drawn: tuple[dict[TensorKey, Tensor], int], dtype: torch.dtype):
    tensors, num_heads = drawn
    layout, buffer = pack(tensors, {}, num_heads, dtype)
    assert buffer.dtype == dtype and buffer.dim() == 1
    assert buffer.numel() == layout.num_elements
    assert buffer.nbytes == layout.nbytes
    assert layout.slots.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(view(buffer, layout, key), tensor.to(dtype))


@settings(deadline=None)
@given(adapters(), st.sampled_from(DTYPES))
def test_runs_are_aligned_and_slots_do_not_overlap(
    drawn: tuple[dict[TensorKey, Tensor], int], dtype: torch.dtype
):
    tensors, num_heads = drawn
    layout, _ = pack(tensors, {}, num_heads, dtype)
    end = 0
    for (layer, target, part), slot in sorted(
        layout.slots.items(), key=lambda item: item[1].offset
    ):
        assert slot.offset >= end
        end = slot.offset + tensors[layer, target, part].numel()
        follows_in_run = (part is Part.A or target == HEADS) and slot.offset != 0
        if part is Part.B or not follows_in_run:
            assert slot.offset * dtype.itemsize % ALIGNMENT == 0
    assert end == layout.num_elements


def test_the_a_parts_of_a_group_are_one_matrix():
    targets = [(0, target) for target in reversed(LAYER_TARGETS)]
    tensors = adapter(targets, [3, 1, 4, 1, 5, 9, 2], 0)
    layout, buffer = pack(tensors, {}, 0, torch.float32)
    for group in GROUPS:
        keys = tuple((0, target, Part.A) for target in group)
        joined = torch.cat([tensors[key] for key in keys])
        assert torch.equal(view_run(buffer, layout, keys), joined)
        assert layout.slots[keys[0]].offset * 4 % ALIGNMENT == 0


def test_heads_are_one_stack():
    """By block, then head; version 1's output matrices, by head."""
    tensors = adapter([(0, "q_proj")], [2], 3, 2, outputs=True)
    tensors[DRAFT_KEY] = torch.randn(5, 6)
    ids = (0, 1, 3, 4, 8)
    layout, buffer = pack(tensors, {(0, "q_proj"): 2.0}, 3, torch.float32, ids)
    assert layout.draft_vocabulary == ids
    assert torch.equal(view(buffer, layout, DRAFT_KEY), tensors[DRAFT_KEY])
    assert layout.slots[DRAFT_KEY].offset * 4 % ALIGNMENT == 0
    for part, count in ((Part.WEIGHT, 6), (Part.BIAS, 6), (Part.OUTPUT, 3)):
        keys = tuple((number, HEADS, part) for number in range(count))
        joined = torch.cat([tensors[key] for key in keys])
        assert torch.equal(view_run(buffer, layout, keys), joined)
        assert layout.slots[keys[0]].offset * 4 % ALIGNMENT == 0
    assert layout.num_elements >= sum(tensor.numel() for tensor in tensors.values())
    assert layout.num_heads == 3
    assert layout.scales == {(0, "q_proj"): 2.0}


def test_a_buffer_to_be_copied_is_whole_units_without_the_bases_rows():
    tensors = adapter([(0, "q_proj")], [3], 2)
    rows = torch.randn(5, 6)
    made: list[Tensor] = []

    def empty(count: int, dtype: torch.dtype) -> Tensor:
        made.append(torch.full((count,), torch.nan, dtype=dtype))
        return made[-1]

    def packed(tensors: dict[TensorKey, Tensor], ids: tuple[int, ...]) -> AdapterLayout:
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        layout, buffer = allocate(shapes, {}, 2, ids, dtype=torch.float32, empty=empty)
        assert buffer is made[-1]
        return layout

    plain, drafting = packed(tensors, ()), packed({**tensors, DRAFT_KEY: rows}, (0, 1, 3, 4, 8))
    assert plain.nbytes % UNIT == drafting.nbytes % UNIT == 0
    assert made[0].nbytes == plain.nbytes
    slot = drafting.slots[DRAFT_KEY]
    assert made[1].numel() == slot.offset == max(each.offset for each in drafting.slots.values())
    assert slot.offset + rows.numel() <= drafting.num_elements
    without = {key: slot for key, slot in drafting.slots.items() if key != DRAFT_KEY}
    assert without == plain.slots
    for key, tensor in tensors.items():
        view(made[0], plain, key).copy_(tensor)
    assert made[0].isfinite().all(), "padding is written"


def test_equal_adapters_give_equal_bytes():
    """Padding too, though a buffer starts as whatever memory held."""
    tensors = adapter(PLACES, [3] * len(PLACES), 2)
    backwards = dict(reversed(tensors.items()))
    _, buffer = pack(tensors, {}, 2, torch.bfloat16)
    for value in (1, 2):
        held = [torch.full_like(buffer, value) for _ in range(50)]
        del held
        assert torch.equal(pack(backwards, {}, 2, torch.bfloat16)[1], buffer)
