"""The segmented op against its token-by-token reference, on every shape a batch can have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.kernels.segmented_lora import (
    GroupLora,
    GroupSegment,
    TargetLora,
    segmented_lora,
    segmented_lora_reference,
)

TOKENS, INNER = 9, 12
OUTS = (10, 6, 6)


def segment(
    start: int, end: int, ranks: dict[int, int], scale: float, seed: int, dtype: torch.dtype
) -> GroupSegment:
    """ranks: rank of each adapted target (index into OUTS); scale: both factors."""
    generator = torch.Generator().manual_seed(seed)
    targets: list[TargetLora] = []
    offset = 0
    for index, rank in ranks.items():
        b_OR = torch.randn(OUTS[index], rank, generator=generator).to(dtype)
        targets.append(TargetLora(index, slice(offset, offset + rank), b_OR, 2.0 * scale))
        offset += rank
    a_RI = torch.randn(offset, INNER, generator=generator).to(dtype)
    return start, end, 0.5, GroupLora(a_RI, tuple(targets))


@st.composite
def segments(draw: st.DrawFn) -> list[GroupSegment]:
    """Empty, single-token, unsorted, overlapping (stacked) and mixed-rank segments."""
    result: list[GroupSegment] = []
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, TOKENS))
        end = draw(st.integers(start, TOKENS))
        ranks = draw(st.dictionaries(st.sampled_from((0, 1, 2)), st.integers(1, 17), min_size=1))
        scale = draw(st.sampled_from((0.25, 1.0, -2.0)))
        ordered = dict(sorted(ranks.items()))
        result.append(segment(start, end, ordered, scale, draw(st.integers(0, 99)), torch.float32))
    return result


def fused_outputs() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Outputs as the decoder has them: columns of one matrix."""
    fused = torch.randn(TOKENS, sum(OUTS), generator=torch.Generator().manual_seed(0))
    return fused, fused.split(OUTS, dim=1)


@settings(deadline=None)
@given(segments())
def test_equals_the_reference(drawn: list[GroupSegment]):
    x_TI = torch.randn(TOKENS, INNER, generator=torch.Generator().manual_seed(1))
    fused, outs = fused_outputs()
    expected, expected_outs = fused_outputs()
    segmented_lora(x_TI, outs, drawn)
    segmented_lora_reference(x_TI, expected_outs, drawn)
    torch.testing.assert_close(fused, expected, atol=1e-3, rtol=1e-4)


def test_tokens_outside_keep_their_bits():
    x_TI = torch.randn(TOKENS, INNER)
    fused, outs = fused_outputs()
    before = fused.clone()
    segmented_lora(x_TI, outs, [segment(3, 5, {1: 4}, 1.0, 0, torch.float32)])
    changed = (fused != before).nonzero()
    assert set(changed[:, 0].tolist()) == {3, 4}
    assert set(changed[:, 1].tolist()) <= set(range(OUTS[0], OUTS[0] + OUTS[1]))


def test_a_float32_output_of_bfloat16_tokens():
    """lm_head: the update is added to float32 logits without rounding them."""
    x_TI = torch.randn(TOKENS, INNER).bfloat16()
    out_TO = torch.randn(TOKENS, OUTS[0])
    expected = out_TO.clone()
    one = [segment(0, TOKENS, {0: 4}, 0.5, 0, torch.bfloat16)]
    segmented_lora(x_TI, (out_TO,), one)
    segmented_lora_reference(x_TI, (expected,), one)
    torch.testing.assert_close(out_TO, expected, atol=0.3, rtol=0.02)
    assert out_TO.dtype == torch.float32
    assert not torch.equal(out_TO, out_TO.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e5, 1e30, 3e38, 1e39, -1e300, math.inf, math.nan, 1e-320])
def test_no_scale_raises_and_none_touches_other_tokens(dtype: torch.dtype, scale: float) -> None:
    x_TI = torch.randn(TOKENS, INNER).to(dtype)
    segments = [segment(2, 4, {0: 3}, scale, 1, dtype), segment(5, 6, {0: 2}, 0.5, 2, dtype)]
    for out_dtype in {dtype, torch.float32}:
        found = torch.zeros(TOKENS, OUTS[0], dtype=out_dtype)
        segmented_lora(x_TI, (found,), segments)
        alone = torch.zeros_like(found)
        segmented_lora(x_TI, (alone,), segments[1:])
        others = [token for token in range(TOKENS) if token not in (2, 3)]
        assert torch.equal(found[others], alone[others])
        assert abs(scale) < 1e39 or out_dtype == torch.float64 or not found[2:4].isfinite().any()
