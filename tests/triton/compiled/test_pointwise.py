"""The pointwise kernels as devices get them, for Mistral-7B's sizes."""

from __future__ import annotations

from typing import Any

import pytest

from lorastack.kernels.triton import pointwise
from tests.helpers.compiled import ARCHITECTURES, MAX_SHARED, compile_kernel

MAX_REGISTERS = 128
POINTERS = {
    **dict.fromkeys(
        ("parts", "bias", "lora", "hidden", "cos", "sin", "out", "frequencies"), "*fp32"
    ),
    **dict.fromkeys(
        ("adapted", "tokens", "outputs", "rows", "slots", "positions", "lasts"), "*i32"
    ),
    **dict.fromkeys(("num_tokens", "num_rows"), "*i32"),
    **dict.fromkeys(("embedding", "norm", "x", "q", "kv", "inner"), "*bf16"),
}
# Of each kernel: constants beside C, and warps.
CASES: dict[str, tuple[Any, dict[str, int], int]] = {
    "embed": (pointwise.embed_kernel, {"BLOCK": pointwise.BLOCK}, 4),
    "norm": (pointwise.norm_kernel, {"BLOCK": 4096}, pointwise.norm_warps(4096)),
    "turn": (pointwise.turn_kernel, {"BLOCK": 64}, 1),
    "rope": (pointwise.rope_kernel, {"BLOCK": 64}, 1),
    "silu": (pointwise.silu_kernel, {"BLOCK": pointwise.BLOCK}, 4),
    "sum": (pointwise.sum_kernel, {"BLOCK": pointwise.BLOCK}, 4),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_kernels(architecture: int, name: str) -> None:
    """With all that they may be given: four parts, a bias, LoRAs, chosen tokens."""
    kernel, constants, warps = CASES[name]
    names = kernel.arg_names
    types = {each: POINTERS.get(each, "i32") for each in names if each not in ("C", "BLOCK")}
    types |= {each: "fp32" for each in ("eps", "scale") if each in types}
    constants = {"C": 4, **constants} if "C" in names else constants
    aligned = [each for each in types if POINTERS.get(each) in ("*fp32", "*bf16")]
    aligned += [each for each in types if each in ("H", "size", "D")]
    found = compile_kernel(kernel, architecture, types, constants, aligned, num_warps=warps)
    # Exact cosines of large angles index a table of theirs in local memory.
    assert found.spills == 0 or name == "turn"
    assert found.registers <= MAX_REGISTERS
    assert found.shared <= MAX_SHARED[architecture]
