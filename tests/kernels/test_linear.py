"""The packed dense layer against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lorastack.kernels.linear import linear, pack_dense


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
