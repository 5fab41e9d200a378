"""The machine: what it is, and the most that can be had of it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial

import torch
import triton

from benchmarks.gpu.clock import bandwidth, seconds_of
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting

FACTS = "name,driver_version,memory.total,compute_cap,clocks.max.sm,clocks.max.memory,power.limit"
SIZE = 8192  # of the matrices


def cases(setting: Setting) -> Cases:
    return {"memory": partial(_memory, setting), "products": partial(_products, setting)}


def _memory(setting: Setting) -> Iterator[Finding]:
    setting.notes["machine"] = _facts()
    least = setting.goal(4100 if "H200" in setting.name else None)
    yield Finding(
        "a copy reads and writes", bandwidth(setting) / 1e9, "GB/s", least=setting.goal(least)
    )


def _products(setting: Setting) -> Iterator[Finding]:
    size = 64 if setting.tiny else SIZE
    a, b = (setting.random(size, size, dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of([lambda: torch.mm(a, b)], 3)
    least = setting.goal(700 if "H200" in setting.name else None)
    yield Finding(
        "cuBLAS in bfloat16", 2 * size**3 / seconds / 1e12, "TFLOP/s", least=setting.goal(least)
    )


def _facts() -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader"]
    smi = "no nvidia-smi"
    if shutil.which(command[0]):
        smi = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    compilers = [name for name in ("cc", "gcc", "clang", "ptxas") if shutil.which(name)]
    return [
        smi,
        f"Python {platform.python_version()}, torch {torch.__version__} (CUDA "
        f"{torch.version.cuda}), triton {triton.__version__}",
        f"compilers: {', '.join(compilers) or 'none'}",
    ]
