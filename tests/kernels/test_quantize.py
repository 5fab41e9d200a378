"""Codes and scales: how near they come to a weight, and what cannot be quantised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.linear import linear, pack_dense, plain_weight
from lorastack.kernels.quantize import (
    GROUP,
    Kind,
    NotFiniteError,
    dequantise,
    head_kind,
    pack_nibbles,
    quantise_torch,
    unpack_nibbles,
)

KINDS = list(Kind)
LIMITS = {Kind.INT8: (-127, 127), Kind.INT4: (-8, 7)}


def random_weight(seed: int) -> Tensor:
    """Of any shape and scale: some outputs zero, some with one large value."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = (int(torch.randint(1, 100, (1,), generator=generator)) for _ in range(2))
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    weight_OI *= 10.0 ** torch.randint(-30, 30, (outputs, 1), generator=generator)
    weight_OI[torch.rand(outputs, generator=generator) < 0.1] = 0
    weight_OI[0, inputs // 2] *= 50
    return weight_OI


def groups(weight_OI: Tensor, kind: Kind) -> Tensor:
    """[out, groups, inputs of a group], padded with zeros."""
    size = weight_OI.shape[1] if kind is Kind.INT8 else GROUP
    padding = -weight_OI.shape[1] % size
    return torch.nn.functional.pad(weight_OI, (0, padding)).unflatten(1, (-1, size))


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_weight_is_near(kind: Kind, seed: int, dtype: torch.dtype) -> None:
    """Within half a step of its group; in int4 on average, for what is clipped is further off."""
    weight_OI = random_weight(seed).to(dtype)
    quantised = quantise_torch(weight_OI, kind)
    found_OI = dequantise(quantised)
    assert found_OI.shape == weight_OI.shape
    least, most = LIMITS[kind]
    assert quantised.codes.shape[1] % GROUP == 0
    assert quantised.codes.min() >= least and quantised.codes.max() <= most
    off = groups((found_OI - weight_OI.float()).abs(), kind)
    largest = groups(weight_OI.float().abs(), kind).amax(dim=2)
    if kind is Kind.INT8:
        assert bool((off.amax(dim=2) <= 0.505 / 127 * largest + 1e-27).all())
    else:
        typical = off.double().square().mean(dim=2).sqrt()
        assert bool((typical <= 0.52 / 7 * largest + 1e-27).all())


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**30))
def test_what_the_kernels_multiply_is_exact_in_bfloat16(kind: Kind, seed: int) -> None:
    quantised = quantise_torch(random_weight(seed), kind)
    assert quantised.scales.dtype == torch.bfloat16
    exact = quantised.codes.float() if kind is Kind.INT8 else dequantise(quantised)
    assert torch.equal(exact, exact.to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**30))
def test_an_output_is_quantised_by_itself(kind: Kind, seed: int) -> None:
    weight_OI = random_weight(seed)
    row = seed % len(weight_OI)
    assert torch.equal(
        dequantise(quantise_torch(weight_OI, kind))[row], dequantised(weight_OI[row], kind)
    )


def dequantised(row_I: Tensor, kind: Kind) -> Tensor:
    return dequantise(quantise_torch(row_I[None], kind))[0]


def test_large_weights_are_cut_where_nobody_sees() -> None:
    """More than one chunk of rows."""
    weight_OI = torch.randn(700, 3000)
    for kind in KINDS:
        found = dequantise(quantise_torch(weight_OI, kind))
        assert torch.equal(found[650:], dequantise(quantise_torch(weight_OI[650:], kind)))


def test_int4_is_better_than_the_largest_value_alone_would_make_it() -> None:
    weight_OI = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    grouped = weight_OI.unflatten(1, (-1, GROUP))
    scale = grouped.abs().amax(dim=2, keepdim=True) / 7
    naive = ((grouped / scale).round().clamp(-8, 7) * scale).flatten(1)
    found = dequantise(quantise_torch(weight_OI, Kind.INT4))
    assert (found - weight_OI).norm() < 0.92 * (naive - weight_OI).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@given(st.integers(0, 2**30))
def test_what_is_not_finite_is_refused(kind: Kind, bad: float, seed: int) -> None:
    weight_OI = random_weight(seed)
    outputs, inputs = weight_OI.shape
    row = seed % outputs
    weight_OI[row, seed // 7 % inputs] = bad
    with pytest.raises(NotFiniteError) as raised:
        quantise_torch(weight_OI, kind)
    assert raised.value.row == row


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64))
def test_nibbles_come_back(codes: list[int]) -> None:
    if len(codes) % 2:
        codes.append(0)
    packed = torch.tensor([codes], dtype=torch.int8)
    assert pack_nibbles(packed).shape == (1, len(codes) // 2)
    assert torch.equal(unpack_nibbles(pack_nibbles(packed)), packed)


def test_lm_head_keeps_8_bits() -> None:
    assert [head_kind(kind) for kind in (None, *KINDS)] == [None, Kind.INT8, Kind.INT8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 70])
def test_the_torch_layer_multiplies_by_that_weight(
    kind: Kind, dtype: torch.dtype, num_rows: int
) -> None:
    weight_OI, bias_O = torch.randn(37, 48).to(dtype), torch.randn(37).to(dtype)
    x = torch.randn(num_rows, 48).to(dtype)
    dense = pack_dense(weight_OI, bias_O, kind=kind)
    assert dense.weight.nbytes == 37 * 64 // (2 if kind is Kind.INT4 else 1)
    expected_OI = dequantise(quantise_torch(weight_OI, kind))
    assert torch.equal(plain_weight(dense), expected_OI)
    expected = torch.nn.functional.linear(x, expected_OI.to(dtype), bias_O)
    assert torch.equal(linear(x, dense), expected)
