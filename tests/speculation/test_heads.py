"""Heads as views of their buffer."""

from __future__ import annotations

import math

import pytest
import torch

from lorastack.kernels.heads import HeadsWeights
from lorastack.layout import HEADS, AdapterLayout, Part, TensorKey, TensorSlot, head_block
from lorastack.speculation.heads import heads_weights, own_outputs

SIZE, VOCAB, NUM_HEADS, NUM_BLOCKS = 6, 11, 2, 3
DRAFT_VOCABULARY = (1, 4, 9)


def make_layout(outputs: Part | None, gap: int = 0) -> AdapterLayout:
    """outputs: what the buffer holds of them."""
    shapes: dict[TensorKey, tuple[int, ...]] = {}
    blocks = range(NUM_HEADS * NUM_BLOCKS)
    shapes |= {(layer, HEADS, Part.WEIGHT): (SIZE, SIZE) for layer in blocks}
    shapes |= {(layer, HEADS, Part.BIAS): (SIZE,) for layer in blocks}
    if outputs is Part.OUTPUT:
        shapes |= {(head, HEADS, outputs): (VOCAB, SIZE) for head in range(NUM_HEADS)}
    if outputs is Part.DRAFT:
        shapes[0, HEADS, outputs] = (len(DRAFT_VOCABULARY), SIZE)
    slots, end = {}, 3
    for key, shape in shapes.items():
        slots[key] = TensorSlot(end, shape)
        end += math.prod(shape) + gap
    return AdapterLayout(
        slots=slots,
        scales={},
        num_elements=end,
        itemsize=4,
        num_heads=NUM_HEADS,
        draft_vocabulary=DRAFT_VOCABULARY if outputs is Part.DRAFT else (),
    )


def view_of(heads: HeadsWeights, key: TensorKey) -> torch.Tensor:
    layer, _, part = key
    for block in range(NUM_BLOCKS):
        for head in range(NUM_HEADS):
            if layer == head_block(head, block, NUM_HEADS) and part is Part.WEIGHT:
                return heads.weight_LKHH[block, head]
            if layer == head_block(head, block, NUM_HEADS) and part is Part.BIAS:
                return heads.bias_LKH[block, head]
    assert heads.output is not None
    return heads.output[layer] if part is Part.OUTPUT else heads.output


@pytest.mark.parametrize("outputs", [None, Part.OUTPUT, Part.DRAFT])
def test_views_share_the_buffer(outputs: Part | None) -> None:
    layout = make_layout(outputs)
    buffer = torch.arange(layout.num_elements, dtype=torch.float32)
    heads = heads_weights(buffer, layout)
    assert heads.num_heads == NUM_HEADS
    assert own_outputs(layout) == (outputs is Part.OUTPUT)
    assert (heads.output is None) == (outputs is None)
    assert (heads.ids_N is None) == (outputs is not Part.DRAFT)
    if heads.ids_N is not None:
        assert (heads.ids_N.dtype, tuple(heads.ids_N.tolist())) == (torch.int64, DRAFT_VOCABULARY)
    for key, slot in layout.slots.items():
        view = view_of(heads, key)
        assert view.data_ptr() == buffer[slot.offset :].data_ptr()
        assert view.shape == slot.shape
        assert view.is_contiguous()


def test_heads_that_are_not_adjacent_are_a_bug_found() -> None:
    layout = make_layout(None, gap=1)
    with pytest.raises(AssertionError, match="not neighbours"):
        heads_weights(torch.zeros(layout.num_elements), layout)
