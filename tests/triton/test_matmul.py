"""Products of a step's tokens with weights: right, and the same bits in any company."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton.matmul import matmul
from lorastack.kernels.triton.weight import SPREAD_TOKENS, MatmulPlan, Weight, pack_weight

KINDS = (None, *Kind)
DTYPES = (torch.float32, torch.bfloat16)
OUTPUTS, INPUTS = 40, 150  # no whole blocks
CASES = [(torch.float32, None), *((torch.bfloat16, kind) for kind in KINDS)]


def random_weight(outputs: int, inputs: int, dtype: torch.dtype, kind: Kind | None) -> Weight:
    """In small blocks, for the interpreter's sake, and in two chunks where there are two blocks."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    packed = pack_weight(torch.randn(outputs, inputs, generator=generator).to(dtype), kind=kind)
    block_inputs = packed.plan.block_inputs if kind else 64
    return replace(packed, plan=MatmulPlan.cut(inputs, 2, 32, block_inputs))


def moved(weight: Weight, device: torch.device) -> Weight:
    scales = None if weight.scales is None else weight.scales.to(device)
    return replace(weight, values=weight.values.to(device), scales=scales)


def multiply(x_TI: Tensor, weight: Weight, bucket: int, device: torch.device) -> Tensor:
    """x W^T in a bucket whose other rows are NaN, before and after."""
    tokens, inputs = x_TI.shape
    padded_TI = torch.full((bucket, inputs), torch.nan, dtype=x_TI.dtype)
    padded_TI[:tokens] = x_TI
    num_parts = weight.plan.num_parts(bucket)
    parts_CTO = torch.full((num_parts, bucket, weight.num_outputs), torch.nan, device=device)
    num_tokens = torch.tensor([tokens], dtype=torch.int32, device=device)
    matmul(padded_TI.to(device), moved(weight, device), parts_CTO, num_tokens)
    total_TO = parts_CTO[0]
    for part_TO in parts_CTO[1:]:
        total_TO = total_TO + part_TO
    assert total_TO[tokens:].isnan().all()
    return total_TO[:tokens].cpu()


def reference(x_TI: Tensor, weight: Weight) -> Tensor:
    weight_OI = weight.rows(torch.arange(weight.num_outputs))
    return x_TI.double() @ weight_OI.double().T


@settings(max_examples=8)
@given(
    st.sampled_from(CASES),
    st.integers(1, 70),
    st.integers(1, 200) | st.sampled_from([64, 128]),
    st.integers(1, 20),
    st.sampled_from([20, SPREAD_TOKENS + 1]),
)
def test_products_are_right(
    device: torch.device,
    case: tuple[torch.dtype, Kind | None],
    outputs: int,
    inputs: int,
    tokens: int,
    bucket: int,
) -> None:
    dtype, kind = case
    weight = random_weight(outputs, inputs, dtype, kind)
    x_TI = torch.randn(tokens, inputs).to(dtype)
    found, wanted = multiply(x_TI, weight, bucket, device).double(), reference(x_TI, weight)
    # Terms of a sum may cancel, so the error is to be small beside their sizes.
    sizes = x_TI.double().abs() @ weight.rows(torch.arange(outputs)).double().abs().T
    assert ((found - wanted).abs() <= 1e-6 * sizes).all()


@cache
def together(dtype: torch.dtype, kind: Kind | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """37 tokens and their products."""
    x_TI = torch.randn(37, INPUTS, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = random_weight(OUTPUTS, INPUTS, dtype, kind)
    assert weight.plan.num_chunks == 2
    return x_TI, multiply(x_TI, weight, 48, device)


@pytest.mark.parametrize(("dtype", "kind"), CASES)
@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 1), (5, 8), (16, 16), (17, 24), (37, SPREAD_TOKENS + 1)]
)
def test_bits_depend_on_the_token_alone(
    device: torch.device, dtype: torch.dtype, kind: Kind | None, tokens: int, bucket: int
) -> None:
    """However many there are, wherever they stand, chunks spread over programs or in turn."""
    x_TI, together_TO = together(dtype, kind, device)
    weight = random_weight(OUTPUTS, INPUTS, dtype, kind)
    assert weight.plan.num_parts(bucket) == (2 if bucket <= SPREAD_TOKENS else 1)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(tokens))[:tokens]
    assert torch.equal(multiply(x_TI[order], weight, bucket, device), together_TO[order])


@pytest.mark.parametrize(("dtype", "kind"), CASES)
def test_nan_stays_in_its_row(device: torch.device, dtype: torch.dtype, kind: Kind | None) -> None:
    x_TI, together_TO = together(dtype, kind, device)
    broken_TI = x_TI[:5].clone()
    broken_TI[1, -1], broken_TI[3, 0] = torch.nan, torch.nan
    weight = random_weight(OUTPUTS, INPUTS, dtype, kind)
    found_TO = multiply(broken_TI, weight, 8, device)
    assert found_TO[[1, 3]].isnan().all()
    assert torch.equal(found_TO[[0, 2, 4]], together_TO[[0, 2, 4]])


@pytest.mark.parametrize("kind", Kind)
def test_codes_give_the_bits_of_the_weight_they_stand_for(device: torch.device, kind: Kind) -> None:
    """int8's sums are multiplied by the scales afterwards: compared without scales, then."""
    weight = random_weight(OUTPUTS, INPUTS, torch.bfloat16, kind)
    if kind is Kind.INT8:
        assert weight.scales is not None
        weight = replace(weight, scales=torch.ones_like(weight.scales))
    whole_OI = weight.rows(torch.arange(OUTPUTS))
    assert torch.equal(whole_OI, whole_OI.bfloat16().float())
    plain = replace(pack_weight(whole_OI.bfloat16()), plan=weight.plan)
    x_TI = torch.randn(5, INPUTS).bfloat16()
    found = multiply(x_TI, weight, 8, device)
    assert torch.equal(found, multiply(x_TI, plain, 8, device))


def test_no_tokens_write_nothing(device: torch.device) -> None:
    weight = random_weight(OUTPUTS, INPUTS, torch.float32, None)
    assert multiply(torch.empty(0, INPUTS), weight, 8, device).numel() == 0


def test_codes_need_bfloat16(device: torch.device) -> None:
    weight = random_weight(OUTPUTS, INPUTS, torch.bfloat16, Kind.INT8)
    with pytest.raises(AssertionError, match="bfloat16"):
        multiply(torch.randn(1, INPUTS), weight, 8, device)
