"""The packed dense layer against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lorastack.kernels.linear import GRAIN, copy_rows, linear, linear_wide, pack_dense, plain_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 70])
def test_equals_torch(num_rows: int, bias: bool, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(37, 48, generator=generator)
    bias_O = torch.randn(37, generator=generator) if bias else None
    x = torch.randn(num_rows, 48, generator=generator)
    dense = pack_dense(weight.to(dtype), None if bias_O is None else bias_O.to(dtype))
    result = linear(x.to(dtype), dense)
    assert result.dtype == dtype and result.is_contiguous()
    expected = functional.linear(x, weight, bias_O)
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=0.02)


def test_takes_rows_of_a_wider_tensor():
    weight = torch.randn(8, 16)
    wide = torch.randn(5, 40)
    result = linear(wide[:, 3:19], pack_dense(weight))
    torch.testing.assert_close(result, functional.linear(wide[:, 3:19], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_weight_comes_back(dtype: torch.dtype):
    weight = torch.randn(37, 48).to(dtype)
    assert torch.equal(plain_weight(pack_dense(weight)), weight)


@pytest.mark.parametrize("num_rows", [1, 300, 1000])
@pytest.mark.parametrize("width", [1, 200, GRAIN + 1])
def test_rows_are_copied_in_pieces_that_one_thread_takes(num_rows: int, width: int):
    sizes = []

    def read(ids_N: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids_N) * width)
        return ids_N[:, None].float().expand(-1, width)

    num_rows = min(num_rows, 4 * GRAIN // width + 1)
    ids_N = torch.randperm(num_rows)
    out_NI = torch.full((num_rows, width), torch.nan)
    copy_rows(read, ids_N, out_NI)
    assert torch.equal(out_NI, ids_N[:, None].float().expand(-1, width))
    assert max(sizes) <= max(GRAIN, width)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wide_products_are_those_of_linear_in_a_wider_dtype(dtype: torch.dtype, bias: bool):
    """Beyond a CPU they are not even rounded on the way: see tests/model/test_transfers.py."""
    x_TI, bias_O = torch.randn(5, 48).to(dtype), torch.randn(37).to(dtype) if bias else None
    dense = pack_dense(torch.randn(37, 48).to(dtype), bias_O)
    found_TO = linear_wide(x_TI, dense)
    assert found_TO.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found_TO, linear(x_TI, dense).to(found_TO.dtype))
