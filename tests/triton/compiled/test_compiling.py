"""What the tests of compiled kernels rest on."""

from __future__ import annotations

import pytest

from tests.helpers.compiled import ARCHITECTURES, compile_kernel
from tests.triton.test_interpreter import multiply_kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_product_uses_matrix_instructions(architecture: int) -> None:
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
    compiled = compile_kernel(multiply_kernel, architecture, types, {"SIZE": 16})
    assert compiled.instructions["HMMA"] > 0
    assert compiled.spills == 0
    assert compiled.registers <= 64
