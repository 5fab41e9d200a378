"""Makes Triton's interpreter fit for tests of bits (3.6.0, 3.7.1). Call `mend` before any launch.

Its product of bfloat16 multiplies the integers that it keeps them in: garbage, and no error. And
its product is numpy's matmul, whose sums depend on where a row stands in its tile, so that equal
rows differ. A product that adds over the inputs in order has neither fault. Its bfloat16 of a
float32 is cut off; a device's is the nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def mend() -> None:
    """Replaces the interpreter's product and its rounding to bfloat16 in this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    def floats(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    @np.errstate(all="ignore")  # as on a device
    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        x, y, kind = floats(a), floats(b), d.data.dtype
        total = d.data.copy()
        for k in range(x.shape[-1]):
            total += x[..., k, None].astype(kind) * y[..., k, None, :].astype(kind)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    plain = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return plain(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    patch, patched = interpreter._patch_lang, set[frozenset[int]]()

    def patch_once(function: Any) -> Any:
        names = function.__globals__.values()
        key = frozenset(id(each) for each in names if each is tl or each is tl.core)
        if key not in patched:
            patched.add(key)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to restore: nobody compiles here

    # Every call of a function by a kernel patches the language anew, which takes milliseconds.
    interpreter._patch_lang = patch_once
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
