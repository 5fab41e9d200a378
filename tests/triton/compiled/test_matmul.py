"""The matmul kernel as devices get it, for every block that a bucket of tokens chooses.

Types and blocks do not depend on a model: one matrix of Mistral-7B stands for all.
"""

from __future__ import annotations

import pytest
import torch

from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton.matmul import BITS, blocks_of, matmul_kernel
from lorastack.kernels.triton.weight import SPREAD_TOKENS, MatmulPlan, Weight
from tests.helpers.compiled import ARCHITECTURES, MAX_SHARED, Compiled, compile_kernel

OUTPUTS, INPUTS = 4096, 14336  # down_proj
FEW, MOST_SPREAD, MANY = 8, SPREAD_TOKENS, SPREAD_TOKENS + 1  # buckets
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# A program of many tokens has a multiprocessor to itself; float32 has no matrix instructions.
FEW_REGISTERS, MANY_REGISTERS = 168, 255


def compiled(
    architecture: int,
    bucket: int,
    dtype: torch.dtype,
    kind: Kind | None = None,
    inputs: int = INPUTS,
) -> Compiled:
    """As `matmul` launches it."""
    plan = MatmulPlan.of(OUTPUTS, inputs, dtype, kind)
    weight = Weight(torch.empty(0, dtype=dtype), None, OUTPUTS, inputs, plan, kind)
    blocks, of_x = blocks_of(weight, bucket), f"*{NAMES[dtype]}"
    types = {"x": of_x, "w": "*u8" if kind else of_x, "parts": "*fp32", "num_tokens": "*i32"}
    types |= dict.fromkeys(("bucket", "N", "K", "KC"), "i32")
    constants: dict[str, object] = {
        "BITS": BITS[kind],
        "SPREAD": plan.num_parts(bucket) == plan.num_chunks,
        "EVEN": inputs % blocks.inputs == 0,
        "BT": blocks.tokens,
        "BN": blocks.outputs,
        "BK": blocks.inputs,
    }
    aligned = ["x", "w", "parts", "KC", "N", *(["K"] if inputs % 16 == 0 else [])]
    if kind is None:
        constants["scales"] = None
    else:
        types["scales"] = "*bf16"
        aligned.append("scales")
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return compile_kernel(matmul_kernel, architecture, types, constants, aligned, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [None, *Kind])
@pytest.mark.parametrize("bucket", [FEW, MOST_SPREAD, MANY])
def test_bfloat16(architecture: int, kind: Kind | None, bucket: int) -> None:
    found = compiled(architecture, bucket, torch.bfloat16, kind)
    assert found.spills == 0
    assert found.registers <= (MANY_REGISTERS if bucket == MANY else FEW_REGISTERS)
    assert found.shared <= MAX_SHARED[architecture]
    assert found.instructions["HGMMA" if architecture == 90 else "HMMA"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bucket", [MOST_SPREAD, MANY])
def test_float32(architecture: int, bucket: int) -> None:
    """No matrix instruction: those of float32 round their inputs."""
    found = compiled(architecture, bucket, torch.float32)
    assert found.spills == 0
    assert found.registers <= MANY_REGISTERS
    assert found.shared <= MAX_SHARED[architecture]
    assert found.instructions["HGMMA"] + found.instructions["HMMA"] == 0


@pytest.mark.parametrize("kind", [None, *Kind])
def test_an_odd_number_of_inputs(kind: Kind | None) -> None:
    found = compiled(80, FEW, torch.bfloat16, kind, INPUTS - 1)
    assert found.spills == 0
    assert found.registers <= FEW_REGISTERS
    assert found.instructions["HMMA"] > 0
