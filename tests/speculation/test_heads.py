import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.layout import HEADS, AdapterLayout, Part, TensorKey, TensorSlot, head_block
from lorastack.speculation.heads import (
    HeadsWeights,
    apply_heads,
    apply_heads_reference,
    output_logits,
    output_logits_reference,
    own_outputs,
    top_candidates,
)

SIZE, VOCAB = 6, 11


def make_layout(
    num_heads: int, num_blocks: int = 1, outputs: bool = False, start: int = 0, gap: int = 0
) -> AdapterLayout:
    shapes: dict[TensorKey, tuple[int, ...]] = {}
    blocks = num_heads * num_blocks
    shapes |= {(layer, HEADS, Part.WEIGHT): (SIZE, SIZE) for layer in range(blocks)}
    shapes |= {(layer, HEADS, Part.BIAS): (SIZE,) for layer in range(blocks)}
    if outputs:
        shapes |= {(head, HEADS, Part.OUTPUT): (VOCAB, SIZE) for head in range(num_heads)}
    slots, end = {}, start
    for key, shape in shapes.items():
        slots[key] = TensorSlot(end, shape)
        end += math.prod(shape) + gap
    return AdapterLayout(
        slots=slots,
        scales={},
        num_elements=end,
        itemsize=4,
        num_heads=num_heads,
        choices=((0,),),
    )


def make_heads(
    num_heads: int, seed: int, num_blocks: int = 1, outputs: bool = False
) -> HeadsWeights:
    layout = make_layout(num_heads, num_blocks, outputs, start=3)
    generator = torch.Generator().manual_seed(seed)
    return HeadsWeights.from_buffer(torch.randn(layout.num_elements, generator=generator), layout)


@pytest.mark.parametrize("outputs", [False, True])
def test_views_share_the_buffer(outputs: bool) -> None:
    layout = make_layout(2, 3, outputs, start=3)
    buffer = torch.arange(layout.num_elements, dtype=torch.float32)
    heads = HeadsWeights.from_buffer(buffer, layout)
    assert (heads.num_heads, heads.choices) == (2, ((0,),))
    views = {
        (head_block(head, block, 2), HEADS, part): stack_LKX[block, head]
        for part, stack_LKX in ((Part.WEIGHT, heads.weight_LKHH), (Part.BIAS, heads.bias_LKH))
        for block in range(3)
        for head in range(2)
    }
    assert own_outputs(layout) == outputs == (heads.output_KVH is not None)
    if heads.output_KVH is not None:
        views |= {(head, HEADS, Part.OUTPUT): heads.output_KVH[head] for head in range(2)}
    assert views.keys() == layout.slots.keys()
    for key, slot in layout.slots.items():
        assert views[key].data_ptr() == buffer[slot.offset :].data_ptr()
        assert views[key].shape == slot.shape
        assert views[key].is_contiguous()


def test_heads_that_are_not_adjacent_are_a_bug_found() -> None:
    layout = make_layout(2, gap=1)
    with pytest.raises(AssertionError, match="not neighbours"):
        HeadsWeights.from_buffer(torch.zeros(layout.num_elements), layout)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [(slice(0, 1), 1)],
        [(slice(0, 5), 3)],
        [(slice(1, 3), 4), (slice(3, 5), 1)],
        [(slice(4, 5), 2), (slice(0, 2), 3)],
        [(slice(2, 2), 3), (slice(3, 4), 2)],
    ],
)
def test_groups_equal_the_reference(groups: list[tuple[slice, int]]) -> None:
    """Groups of one block a head and of several side by side."""
    hidden_BH = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))
    uses = [(rows, make_heads(num, seed, 1 + seed)) for seed, (rows, num) in enumerate(groups)]
    expected_XH = apply_heads_reference(hidden_BH, uses)
    torch.testing.assert_close(apply_heads(hidden_BH, uses), expected_XH)
    assert len(expected_XH) == sum(len(range(5)[rows]) * num for rows, num in groups)


def test_the_head_maths_of_the_formats_page() -> None:
    """Head 2 of version 1: two blocks in a row, then its own output matrix."""
    heads = make_heads(2, seed=0, num_blocks=2, outputs=True)
    assert heads.output_KVH is not None
    r_H = torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    r_XH = apply_heads(r_H[None], [(slice(0, 1), heads)])
    for block in range(2):
        z_H = heads.weight_LKHH[block, 1] @ r_H + heads.bias_LKH[block, 1]
        r_H = r_H + z_H / (1 + torch.exp(-z_H))
    torch.testing.assert_close(r_XH[1], r_H)
    logits_XV = output_logits(r_XH, heads.output_KVH)
    torch.testing.assert_close(logits_XV[1], heads.output_KVH[1] @ r_H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_heads"), [(1, 1), (1, 4), (5, 1), (4, 3)])
def test_own_outputs_equal_the_reference(num_rows: int, num_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    output_KVH = torch.randn(num_heads, VOCAB, SIZE, generator=generator).to(dtype)
    r_XH = torch.randn(num_rows * num_heads, SIZE, generator=generator).to(dtype)
    logits_XV = output_logits(r_XH, output_KVH)
    assert logits_XV.dtype == torch.float32
    torch.testing.assert_close(logits_XV, output_logits_reference(r_XH, output_KVH))


def sorted_ids(logits_V: Tensor, num: int) -> list[int]:
    values = logits_V.tolist()
    return sorted(range(len(values)), key=lambda token: (-values[token], token))[:num]


@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([2, 4, 1000]))
def test_candidates_equal_a_full_sort_with_ties(seed: int, num: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_XV = torch.randint(levels, (3, 9), generator=generator).float()
    ids_XR = top_candidates(logits_XV, num)
    assert ids_XR.dtype == torch.int64
    assert ids_XR.tolist() == [sorted_ids(row, num) for row in logits_XV]


def test_candidates_of_a_large_flat_vocabulary() -> None:
    assert top_candidates(torch.zeros(2, 5000), 3).tolist() == [[0, 1, 2]] * 2
