"""The native quantiser: the bits of the plain reference, and nothing beside what it is given."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.native.isa import Isa
from lorastack.kernels.native.library import library
from lorastack.kernels.ops import NativeOps
from lorastack.kernels.quantize import STORED, Kind, Quantised, quantise_reference
from tests.helpers.guarded import guarded
from tests.helpers.isas import FLOAT32, each_of

ISAS = each_of(*FLOAT32)

INPUTS = (1, 2, 31, 32, 33, 64, 100, 480, 511, 512, 513, 544, 1100)  # 512: groups of one vector
LARGEST = torch.finfo(torch.bfloat16).max


def weight(seed: int) -> Tensor:
    """bfloat16 of any shape: a group's largest values may be equal, tiny, huge or all it has."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    outputs, inputs = chance.randint(1, 6), chance.choice(INPUTS)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    style = chance.choice(("normal", "grid", "bits", "sparse"))
    if style == "grid":  # many candidates are equally good
        weight_OI = (weight_OI * 4).round() / 4
    elif style == "bits":
        bits = torch.randint(0, 1 << 16, (outputs, inputs), generator=generator)
        return finite((bits - (1 << 15)).to(torch.int16).view(torch.bfloat16))
    elif style == "sparse":
        weight_OI *= torch.rand(outputs, inputs, generator=generator) < 0.05
    exponents = torch.randint(-140, 128, (outputs, -(-inputs // 32)), generator=generator)
    sizes = torch.ldexp(torch.ones(exponents.shape), exponents).repeat_interleave(32, dim=1)
    return finite((weight_OI * sizes[:, :inputs]).bfloat16())


def finite(weight_OI: Tensor) -> Tensor:
    return weight_OI.nan_to_num(-LARGEST, LARGEST, -LARGEST)


def native(isa: Isa, weight_OI: Tensor, kind: Kind, threads: int) -> Quantised:
    """What is read and written lies before guarded pages, full of ones."""
    loaded, read = library(), guarded(weight_OI)
    assert loaded is not None
    like = quantise_reference(torch.zeros_like(weight_OI), kind)
    codes = guarded(torch.full_like(like.codes, -1))
    scales = guarded(torch.full_like(like.scales, torch.nan))
    loaded.lorastack_quantise(
        *(isa, read.data_ptr(), *weight_OI.shape, STORED[kind]),
        *(codes.data_ptr(), scales.data_ptr(), threads),
    )
    return Quantised(codes, scales, weight_OI.shape[1])


def assert_same(found: Quantised, expected: Quantised) -> None:
    assert torch.equal(found.scales.view(torch.int16), expected.scales.view(torch.int16))
    assert torch.equal(found.codes, expected.codes)
    assert found.inputs == expected.inputs


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(Kind))
@given(st.integers(0, 2**30), st.integers(1, 3))
def test_has_the_bits_of_the_reference(isa: Isa, kind: Kind, seed: int, threads: int) -> None:
    weight_OI = weight(seed)
    expected, ops = quantise_reference(weight_OI, kind), NativeOps(isa, None)
    assert_same(native(isa, weight_OI, kind, threads), expected)
    assert_same(ops.quantise(weight_OI, kind), expected)
    assert_same(ops.quantise(weight_OI.float(), kind), expected)
    assert_same(ops.quantise(weight_OI.T.contiguous().T, kind), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0x7FFF, -0x80, -0x40, -1])
@given(st.integers(0, 2**30))
def test_a_scale_says_where_a_weight_is_not_finite(
    isa: Isa, kind: Kind, bits: int, seed: int
) -> None:
    weight_OI = weight(seed)
    weight_OI.view(torch.int16).view(-1)[seed % weight_OI.numel()] = bits
    found, expected = native(isa, weight_OI, kind, 1), quantise_reference(weight_OI, kind)
    sound = expected.scales.isfinite()
    assert (~sound).sum() == 1
    assert torch.equal(found.scales.isfinite(), sound)
    assert torch.equal(found.scales[sound], expected.scales[sound])


@pytest.mark.parametrize("isa", ISAS)
def test_errors_are_summed_as_the_reference_does(isa: Isa) -> None:
    """In some of so many groups another order, or a fused product, would choose another scale."""
    weight_OI = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = quantise_reference(weight_OI, Kind.INT4)
    assert_same(native(isa, weight_OI, Kind.INT4, 2), expected)
