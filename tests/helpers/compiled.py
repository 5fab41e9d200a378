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

import torch

from lorastack.kernels.triton.launch import OPTIONS

ARCHITECTURES = (80, 90, 120)
# Bytes that a program may have: sm_80 and sm_120 keep 100 KiB a multiprocessor in reach, sm_90 227.
MAX_SHARED = {80: 100 << 10, 90: 227 << 10, 120: 99 << 10}
_INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA|LDGSTS|LDG|LDL|STL|DFMA)\b")
_WIDE_LOADS = re.compile(r"\b(?:LDG|LDGSTS)\.E[.A-Z0-9]*\.128\b")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_RESOURCES = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: a thread. shared: bytes a program. instructions: how many there are of each.
    wide_loads: those of 16 bytes."""

    registers: int
    shared: int
    instructions: Counter[str]
    wide_loads: int

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


@dataclass(frozen=True, slots=True)
class Launch:
    """What was to be launched."""

    kernel: Any
    args: tuple[object, ...]
    settings: dict[str, Any]

    @property
    def version(self) -> tuple[object, ...]:
        """What Triton tells binaries of a kernel apart by: launches with equal ones share one."""
        types, constants, aligned, options = self._specialised()
        ones = [
            parameter.name
            for parameter, value in zip(self.kernel.params, self.args, strict=False)
            if isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ]
        told = (*types.items(), *constants.items(), *options.items())
        return (self.kernel.fn.__name__, *told, *aligned, "ones", *ones)

    def compiled(self, architecture: int) -> Compiled:
        """With the types, constants and alignments of its arguments, as a launch compiles it."""
        types, constants, aligned, options = self._specialised()
        return compile_kernel(self.kernel, architecture, types, constants, aligned, **options)

    def _specialised(
        self,
    ) -> tuple[dict[str, str], dict[str, object], list[str], dict[str, Any]]:
        """See `compile_kernel`: types, constants, aligned, options."""
        types: dict[str, str] = {}
        aligned: list[str] = []
        names = {parameter.name for parameter in self.kernel.params}
        constants: dict[str, object] = {
            name: value for name, value in self.settings.items() if name in names
        }
        for parameter, value in zip(self.kernel.params, self.args, strict=False):
            if value is None:
                constants[parameter.name] = None
                continue
            types[parameter.name] = _type_of(value)
            place = value.data_ptr() if isinstance(value, torch.Tensor) else value
            told = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
            if told and isinstance(place, int) and place % 16 == 0:
                aligned.append(parameter.name)
        options = {name: value for name, value in self.settings.items() if name not in names}
        return types, constants, aligned, options


class Recorder:
    """In the place of `launch` it launches nothing. launches: in their order."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any, grid: Sequence[int], *args: object, **settings: object) -> None:
        self.launches.append(Launch(kernel, args, settings))


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _read(cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = _dump(file.name)
    resources = dict(_RESOURCES.findall(code))
    return Compiled(
        registers=int(resources["REG"]),
        shared=shared,
        instructions=Counter(_INSTRUCTIONS.findall(code)),
        wide_loads=len(_WIDE_LOADS.findall(code)),
    )


def _dump(file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "-res-usage", "-sass", file], capture_output=True, text=True, check=True
    )
    return done.stdout
