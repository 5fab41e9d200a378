"""What the kernels' tests rest on: products in the interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorastack.kernels.triton.launch import launch, why_not


@triton.jit
def multiply_kernel(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(a + square), tl.load(b + square), input_precision="ieee")
    tl.store(out + square, product)


@triton.jit
def round_kernel(a, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(a + i))


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(a.shape, device=a.device)
    launch(multiply_kernel, (1,), a, b, out, SIZE=len(a))
    return out


def test_bfloat16_products_are_right(device: torch.device) -> None:
    a, b = torch.randn(2, 16, 16, device=device).bfloat16()
    torch.testing.assert_close(multiply(a, b), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_equal_rows_have_equal_bits(device: torch.device) -> None:
    row, b = torch.randn(1, 16, device=device), torch.randn(16, 16, device=device)
    out = multiply(row.expand(16, 16).contiguous(), b)
    assert (out == out[0]).all()


def test_bfloat16_is_the_nearest(device: torch.device) -> None:
    torch.manual_seed(0)
    wide = 10 ** torch.randint(-44, 38, (4096,)).float() * torch.randn(4096)
    ties = torch.arange(0, 4096).float() / 16 + 1
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -1e-45, 1.0])
    values = torch.cat([wide, ties, special.repeat(1024)]).to(device)
    out = torch.empty(len(values), dtype=torch.bfloat16, device=device)
    launch(round_kernel, (1,), values, out, SIZE=len(values))
    torch.testing.assert_close(out, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_kernels_run_here(device: torch.device) -> None:
    assert why_not(device) == ""
