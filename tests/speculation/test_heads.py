import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.layout import HEADS, AdapterLayout, Part, TensorSlot
from lorastack.speculation.heads import (
    HeadsWeights,
    apply_heads,
    apply_heads_reference,
    top_candidates,
)

SIZE = 6


def make_layout(num_heads: int, start: int = 0, gap: int = 0) -> AdapterLayout:
    weights = num_heads * (SIZE * SIZE + gap)
    slots = {
        **{
            (head, HEADS, Part.WEIGHT): TensorSlot(start + head * (SIZE * SIZE + gap), (SIZE, SIZE))
            for head in range(num_heads)
        },
        **{
            (head, HEADS, Part.BIAS): TensorSlot(start + weights + head * SIZE, (SIZE,))
            for head in range(num_heads)
        },
    }
    return AdapterLayout(
        slots=slots,
        scales={},
        num_elements=start + weights + num_heads * SIZE,
        itemsize=4,
        num_heads=num_heads,
        choices=((0,),),
    )


def make_heads(num_heads: int, seed: int) -> HeadsWeights:
    layout = make_layout(num_heads, start=3)
    generator = torch.Generator().manual_seed(seed)
    return HeadsWeights.from_buffer(torch.randn(layout.num_elements, generator=generator), layout)


def test_views_share_the_buffer() -> None:
    layout = make_layout(2, start=3)
    buffer = torch.arange(layout.num_elements, dtype=torch.float32)
    heads = HeadsWeights.from_buffer(buffer, layout)
    assert (heads.num_heads, heads.choices) == (2, ((0,),))
    for head in range(2):
        for part, view in ((Part.WEIGHT, heads.weight_KHH), (Part.BIAS, heads.bias_KH)):
            slot = layout.slots[head, HEADS, part]
            assert view[head].data_ptr() == buffer[slot.offset :].data_ptr()
            assert view[head].shape == slot.shape
            assert view[head].is_contiguous()


def test_heads_that_are_not_adjacent_are_a_bug_found() -> None:
    layout = make_layout(2, gap=1)
    with pytest.raises(AssertionError, match="adjacent"):
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
    hidden_BH = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))
    uses = [(rows, make_heads(num, seed)) for seed, (rows, num) in enumerate(groups)]
    expected_XH = apply_heads_reference(hidden_BH, uses)
    torch.testing.assert_close(apply_heads(hidden_BH, uses), expected_XH)
    assert len(expected_XH) == sum(len(range(5)[rows]) * num for rows, num in groups)


def test_the_head_maths_of_the_formats_page() -> None:
    heads = make_heads(2, seed=0)
    x_H = torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    r_XH = apply_heads(x_H[None], [(slice(0, 1), heads)])
    z_H = heads.weight_KHH[1] @ x_H + heads.bias_KH[1]
    torch.testing.assert_close(r_XH[1], x_H + z_H / (1 + torch.exp(-z_H)))


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
