"""Compile the native library with the system's C++ compiler.

    python -m lorastack.kernels.native.build [TARGET FLAG...]

TARGET and FLAGs make another library, for tests (see `make check-native`).

Each source is compiled for its own instruction set, and `dispatch.cpp` chooses among them when the
program runs, so a library does not depend on the machine that compiles it. Native kernels are for
x86-64 only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "liblorastack.so"
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_BF16 = (*_AVX512, "-mavx512bf16")
SOURCES: dict[str, tuple[str, ...]] = {
    "dispatch.cpp": (),
    "avx512.cpp": _AVX512,
    "quantiser.cpp": (*_AVX512, "-ffp-contract=off"),  # every operation rounds, as in torch
    "avx512_bf16.cpp": _BF16,
    "amx.cpp": (*_BF16, "-mamx-tile", "-mamx-bf16"),
}
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra")
# GCC's own intrinsics raise this warning.
_QUIET = ("-Wno-maybe-uninitialized",)


def sources() -> str:
    """sha256 of the C++ sources, compiled into the library, which library.py compares at load."""
    digest = hashlib.sha256()
    for path in sorted((*HERE.glob("*.h"), *HERE.glob("*.cpp"))):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def build(target: Path = LIBRARY, extra: tuple[str, ...] = ()) -> str:
    """Compile the library into `target`. extra: flags for every call of the compiler.

    Returns "", or why no library was made: callers go on without it.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"no native kernels for {platform.machine()} {sys.platform}"
    if compiler is None:
        return "no C++ compiler (c++, g++ or CXX)"
    named = f'-DLORASTACK_SOURCES="{sources()}"'
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compiled(name: str) -> str:
            output = str(Path(folder, name).with_suffix(".o"))
            flags = (*_FLAGS, *_QUIET, *SOURCES[name], named, *extra)
            _run(compiler, *flags, "-c", str(HERE / name), "-o", output)
            return output

        try:
            objects = list(pool.map(compiled, SOURCES))
            made = target.with_suffix(f".{os.getpid()}")  # the old one may be mapped
            _run(compiler, "-shared", "-fopenmp", *extra, *objects, "-o", str(made))
        except subprocess.CalledProcessError as error:
            return f"{compiler} failed:\n{error.stderr}"
        made.replace(target)
    return ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    target, *flags = sys.argv[1:] or (LIBRARY,)
    if problem := build(Path(target), tuple(flags)):
        sys.stderr.write(f"lorastack runs without native kernels: {problem}\n")
