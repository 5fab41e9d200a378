"""Packed weights: what the codes stand for, and how matrices are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.kernels.linear import pack_dense, plain_weight
from lorastack.kernels.quantize import Kind, NotFiniteError
from lorastack.kernels.triton.weight import SPREAD_TOKENS, TILE, MatmulPlan, pack_weight


@pytest.mark.parametrize("kind", Kind)
@given(st.integers(1, 40), st.integers(1, 300))
def test_codes_stand_for_the_reference_weight(kind: Kind, outputs: int, inputs: int) -> None:
    weight_OI = torch.randn(outputs, inputs).bfloat16()
    packed, dense = pack_weight(weight_OI, kind=kind), pack_dense(weight_OI, kind=kind)
    ids = torch.randint(outputs, (7,))
    assert torch.equal(packed.rows(ids), plain_weight(dense)[ids])
    tiles = -(-inputs // TILE)
    assert packed.values.shape == (tiles, outputs, TILE if kind is Kind.INT8 else TILE // 2)
    assert packed.values.is_contiguous() and packed.scales is not None
    assert packed.scales.is_contiguous()


def test_a_plain_weight_is_kept() -> None:
    weight_OI, bias_O = torch.randn(6, 10).bfloat16(), torch.randn(6).bfloat16()
    packed = pack_weight(weight_OI, bias_O)
    assert packed.values.data_ptr() == weight_OI.data_ptr()
    assert packed.bias_O is not None and torch.equal(packed.bias_O, bias_O.float())
    assert torch.equal(packed.rows(torch.tensor([4, 1])), weight_OI[[4, 1]])


@pytest.mark.parametrize("kind", Kind)
def test_codes_need_a_finite_weight(kind: Kind) -> None:
    weight_OI = torch.randn(6, 10).bfloat16()
    weight_OI[2, 3] = torch.inf
    with pytest.raises(NotFiniteError, match="row 2"):
        pack_weight(weight_OI, kind=kind)


@given(
    st.integers(1, 200000),
    st.integers(1, 30000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, *Kind]),
)
def test_chunks_cover_the_inputs(
    outputs: int, inputs: int, dtype: torch.dtype, kind: Kind | None
) -> None:
    plan = MatmulPlan.of(outputs, inputs, dtype, kind)
    assert plan.chunk % plan.block_inputs == 0
    assert (plan.num_chunks - 1) * plan.chunk < inputs <= plan.num_chunks * plan.chunk
    assert plan.num_parts(SPREAD_TOKENS) == plan.num_chunks
    assert plan.num_parts(SPREAD_TOKENS + 1) == 1


@pytest.mark.parametrize(
    ("outputs", "inputs", "num_chunks"),
    [(6144, 4096, 2), (4096, 4096, 4), (28672, 4096, 1), (4096, 14336, 4), (32000, 4096, 1)],
)
def test_matrices_of_mistral_7b(outputs: int, inputs: int, num_chunks: int) -> None:
    """Small matrices are cut, so that few tokens keep a device busy."""
    assert MatmulPlan.of(outputs, inputs, torch.bfloat16).num_chunks == num_chunks
