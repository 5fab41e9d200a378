"""Compiles Triton kernels for CUDA devices that are not here, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorastack.kernels.triton.launch import OPTIONS

ARCHITECTURES = (80, 90, 120)
# Bytes that a program may have: sm_80 and sm_120 keep 100 KiB a multiprocessor in reach, sm_90 227.
MAX_SHARED = {80: 100 << 10, 90: 227 << 10, 120: 99 << 10}
_INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA|LDGSTS|LDG|LDL|STL|DFMA)\b")
_RESOURCES = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: a thread. shared: bytes a program. instructions: how many there are of each."""

    registers: int
    shared: int
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return self.instructions["LDL"] + self.instructions["STL"]


def compile_kernel(
    kernel: Any,
    architecture: int,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    aligned: Sequence[str] = (),
    **options: int,
) -> Compiled:
    """types: of the arguments that are no constants, by name, as "*bf16" or "i32".

    aligned: pointers and integers that are multiples of 16. options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options={**OPTIONS, **options})
    return _read(made.asm["cubin"], made.metadata.shared)


def _read(cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = dict(_RESOURCES.findall(_dump("-res-usage", file.name)))
        instructions = Counter(_INSTRUCTIONS.findall(_dump("-sass", file.name)))
    return Compiled(int(resources["REG"]), shared, instructions)


def _dump(what: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, what, file], capture_output=True, text=True, check=True)
    return done.stdout
