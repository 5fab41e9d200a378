"""Quantised weights in the native product: the bits of the bfloat16 kernel on their values."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa
from lorastack.kernels.native.matrix import PackedMatrix, matrix_rows, pack_matrix, pack_pair
from lorastack.kernels.quantize import GROUP, Kind, dequantise, quantise_torch
from tests.helpers.guarded import guarded
from tests.helpers.isas import each_of, here

ISAS = each_of()
KINDS = list(Kind)


def multiply(matrix: PackedMatrix, x_TI: Tensor, outputs: int, isa: Isa) -> Tensor:
    """x W^T, float32 [T, outputs]; what the kernel reads and writes lies before a guarded page."""
    rows = len(x_TI)
    x = torch.zeros(-(-rows // 32) * 32, matrix.inputs, dtype=torch.bfloat16)
    x[:rows, : x_TI.shape[1]] = x_TI
    x, out_TO = guarded(x), guarded(torch.full((rows, outputs), torch.nan))
    head = native.LmHead(
        *(matrix.struct, None, x.data_ptr(), out_TO.data_ptr(), None),
        *(0, rows, outputs, matrix.inputs, 2, isa, True),
    )
    library = native.library()
    assert library is not None
    library.lorastack_logits(head)
    return out_TO


def case(seed: int) -> tuple[Tensor, Tensor]:
    """A weight and rows of any size."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    outputs, inputs = chance.randint(1, 150), chance.choice((1, 31, 32, 33, 64, 96, 500, 2080))
    rows = chance.choice((1, 2, 4, 8, 11, 12, 13, 16, 17, 31, 32, 33, 70))
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return weight_OI, torch.randn(rows, inputs, generator=generator).bfloat16()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(st.integers(0, 2**30))
def test_equals_the_bfloat16_kernel(isa: Isa, kind: Kind, seed: int) -> None:
    weight_OI, x_TI = case(seed)
    outputs, inputs = weight_OI.shape
    quantised = quantise_torch(weight_OI, kind)
    if kind is Kind.INT8:
        plain = pack_matrix(quantised.codes[:, :inputs].bfloat16())
        expected = multiply(plain, x_TI, outputs, isa) * quantised.scales.float().T
    else:
        plain = pack_matrix(dequantise(quantised).bfloat16())
        expected = multiply(plain, x_TI, outputs, isa)
    packed = pack_matrix(weight_OI, kind=kind, keep=lambda each: guarded(each.contiguous()))
    found = multiply(packed, x_TI, outputs, isa)
    assert torch.equal(found, expected)
    exact = x_TI.double() @ dequantise(quantised).double().T
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [None, *KINDS])
@settings(max_examples=60)
@given(st.integers(0, 2**30))
def test_a_rows_bits_are_its_own(isa: Isa, kind: Kind | None, seed: int) -> None:
    weight_OI, x_TI = case(seed)
    packed = pack_matrix(weight_OI.bfloat16(), kind=kind)
    row = seed % len(x_TI)
    found = multiply(packed, x_TI, len(weight_OI), isa)
    x_TI[torch.arange(len(x_TI)) != row] = torch.nan
    for part in (x_TI, x_TI[row : row + 1]):
        alone = multiply(packed, part, len(weight_OI), isa)
        assert torch.equal(alone[min(row, len(part) - 1)], found[row])


@pytest.mark.skipif(len(here()) < 2, reason="needs two instruction sets")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(st.integers(0, 2**30))
def test_instruction_sets_agree(kind: Kind, seed: int) -> None:
    weight_OI, x_TI = case(seed)
    packed = pack_matrix(weight_OI, kind=kind)
    first, *others = (multiply(packed, x_TI, len(weight_OI), isa) for isa in here())
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_panels(isa: Isa, kind: Kind) -> None:
    """gate and up in turn, each padded to itself."""
    weight_OI, x_TI = torch.randn(2 * 40, 96), torch.randn(5, 96).bfloat16()
    found = multiply(pack_pair(weight_OI, kind=kind), x_TI, 128, isa)
    plain = multiply(pack_matrix(weight_OI, kind=kind), x_TI, 80, isa)
    panels = found.unflatten(1, (-1, 2, 16))
    assert torch.equal(panels[:, :, 0].flatten(1)[:, :40], plain[:, :40])
    assert torch.equal(panels[:, :, 1].flatten(1)[:, :40], plain[:, 40:])


@given(st.integers(0, 2**30))
def test_rows_of_int8(seed: int) -> None:
    weight_OI, _ = case(seed)
    outputs, inputs = weight_OI.shape
    ids_N = torch.randint(outputs, (9,))
    found = matrix_rows(pack_matrix(weight_OI, kind=Kind.INT8), ids_N)
    assert found.shape == (9, -(-inputs // GROUP) * GROUP)
    assert torch.equal(found[:, :inputs], dequantise(quantise_torch(weight_OI, Kind.INT8))[ids_N])
