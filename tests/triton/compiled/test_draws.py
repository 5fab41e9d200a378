"""Draws, acceptance and heads, compiled: nothing spills, and programs find room beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lorastack.kernels.triton import accept, heads, samples
from tests.helpers.compiled import ARCHITECTURES, MAX_SHARED, Compiled, compile_kernel

H200 = 90


def types_of(kernel: Any, constants: Mapping[str, object], **others: str) -> dict[str, str]:
    """int32 tensors, but for `others`."""
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: others.get(name, "*i32") for name in names}


def check(compiled: Compiled, architecture: int, registers: int) -> None:
    assert compiled.spills == 0
    assert compiled.registers <= registers
    assert compiled.shared <= MAX_SHARED[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_draws(architecture: int) -> None:
    """16 warps: more than 128 registers would not even start."""
    kernel, constants = samples.sample_kernel, {"SPANS": 32, "BLOCK": samples.BLOCK}
    words = {"stride_x": "i32", "vocab": "i32", "spans": "i32"}
    floats = {"logits": "*fp32", "peaks": "*fp32", "keys": "*i64", "settings": "*i64"}
    types = types_of(kernel, constants, **words, **floats)
    made = compile_kernel(
        kernel, architecture, types, constants, ("logits",), num_warps=samples.SAMPLE_WARPS
    )
    check(made, architecture, 128)


def test_best_tokens() -> None:
    kernel, constants = samples.best_kernel, {"SPAN": samples.SPAN}
    words = {"stride_x": "i32", "vocab": "i32"}
    types = types_of(kernel, constants, **words, logits="*fp32", keys="*i64")
    check(compile_kernel(kernel, H200, types, constants, ("logits",), num_warps=8), H200, 64)


def test_acceptance() -> None:
    kernel, constants = accept.accept_kernel, {"NODES": 64}
    types = types_of(kernel, constants, stride="i32")
    check(compile_kernel(kernel, H200, types, constants, num_warps=1), H200, 64)


def test_moves() -> None:
    kernel = accept.move_kernel
    constants = {"PAGE": 16, "SIDES": 16, "SIZE": 128, "BLOCK_SIDES": 16, "BLOCK_SIZE": 128}
    types = types_of(kernel, constants, kv="*bf16", stride="i32", num_pages="i32")
    check(compile_kernel(kernel, H200, types, constants, ("kv",), num_warps=4), H200, 64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states(architecture: int) -> None:
    """Of a block behind the first: it reads states where it writes them."""
    kernel, sizes = heads.states_kernel, heads.sizes(4096, 2)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**sizes, "FIRST": False}
    words = {"room": "i32", "block": "i32", "tiles": "*i64"}
    types = types_of(kernel, constants, **words, hidden="*bf16", r="*bf16")
    aligned = ("hidden", "r")
    made = compile_kernel(kernel, architecture, types, constants, aligned, **options)
    check(made, architecture, 128)
    assert made.instructions["HMMA"] + made.instructions["HGMMA"] > 0
    assert made.instructions["LDGSTS"] > 0


@pytest.mark.parametrize(("itemsize", "kind"), [(2, "*bf16"), (4, "*fp32")])
def test_logits_of_heads(itemsize: int, kind: str) -> None:
    kernel, sizes = heads.logits_kernel, heads.sizes(4096, itemsize)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    words = {"room": "i32", "stride": "i32", "tiles": "*i64", "logits": "*fp32"}
    types = types_of(kernel, sizes, **words, r=kind)
    made = compile_kernel(kernel, H200, types, sizes, ("r",), **options)
    check(made, H200, 128)
    assert made.instructions["LDGSTS"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_top(architecture: int) -> None:
    """Of as many tokens as a head may propose."""
    kernel, constants = heads.top_kernel, {"RANK": 64, "BLOCK": heads.BLOCK}
    words = {"stride": "i32", "out_stride": "i32", "num": "i32", "tokens": "*i64"}
    types = types_of(kernel, constants, **words, logits="*fp32", out_logprobs="*fp32")
    made = compile_kernel(kernel, architecture, types, constants, ("logits",), num_warps=8)
    check(made, architecture, 128)
