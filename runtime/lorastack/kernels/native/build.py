"""Compile the native library with the system's C++ compiler.

    python -m lorastack.kernels.native.build [TARGET FLAG...]

TARGET and FLAGs make another library, for tests (see `make check-native`).

Each source is compiled for its own instruction set, and `dispatch.cpp` chooses among them when the
program runs, so a library runs on any machine of its architecture. CXX names another compiler,
which may be for another architecture (see `make check-arm`).
"""

from __future__ import annotations

import hashlib
import os
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
# Loops over lanes are vectorised at -O2 too, and compiled in half the time.
_ANY: dict[str, tuple[str, ...]] = {"dispatch.cpp": (), "plain.cpp": ("-O2", "-ftree-vectorize")}
_ARM = {**_ANY, "neon.cpp": (), "neon_bf16.cpp": ("-march=armv8.2-a+bf16",)}
# By the architecture's name in `c++ -dumpmachine`. The least instructions first: of an inline
# function that several objects hold, such as one of std::vector, the linker keeps the first.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "aarch64": _ARM,
    "arm64": _ARM,  # of Apple
    "x86_64": {
        **_ANY,
        "avx2.cpp": ("-mavx2", "-mfma"),
        "avx512.cpp": _AVX512,
        "avx512_bf16.cpp": _BF16,
        "amx.cpp": (*_BF16, "-mamx-tile", "-mamx-bf16"),
    },
}
# Products are fused with sums only where a kernel says so: the same bits from every compiler.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra"),
)
# GCC's own intrinsics raise the first two, vectors as template arguments and arguments the others.
_QUIET = (
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    *("-Wno-ignored-attributes", "-Wno-psabi"),
)
# OpenMP: flags of a source and of the library. Apple's clang knows the pragmas, but has neither a
# header nor a runtime: that is torch's own, which is loaded before the library. Never tried there.
_OPENMP = {
    "linux": (("-fopenmp",), ("-fopenmp",)),
    "darwin": (("-Xpreprocessor", "-fopenmp"), ("-undefined", "dynamic_lookup")),
}


NO_COMPILER = "no C++ compiler: install g++, or name one in CXX"


def sources() -> str:
    """sha256 of the C++ sources, compiled into the library, which library.py compares at load."""
    digest = hashlib.sha256()
    for path in sorted((*HERE.glob("*.h"), *HERE.glob("*.cpp"))):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def found_compiler() -> str | None:
    """CXX of the environment, or the system's C++ compiler."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(target: Path = LIBRARY, extra: tuple[str, ...] = ()) -> str:
    """Compile the library into `target`. extra: flags for every call of the compiler.

    Returns "", or why no library was made: callers go on without it.
    """
    compiler = found_compiler()
    if compiler is None:
        return NO_COMPILER
    named = f'-DLORASTACK_SOURCES="{sources()}"'
    openmp, linked = _OPENMP.get(sys.platform, _OPENMP["linux"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compiled(name: str) -> str:
            output = str(Path(folder, name).with_suffix(".o"))
            flags = (*_FLAGS, *_QUIET, *openmp, *flags_of[name], named, *extra)
            _run(compiler, *flags, "-c", str(HERE / name), "-o", output)
            return output

        try:
            flags_of = SOURCES.get(_run(compiler, "-dumpmachine").partition("-")[0], _ANY)
            objects = list(pool.map(compiled, flags_of))
            made = target.with_suffix(f".{os.getpid()}")  # the old one may be mapped
            _run(compiler, "-shared", *linked, *extra, *objects, "-o", str(made))
        except subprocess.CalledProcessError as error:
            return f"{compiler} failed:\n{error.stderr}"
        except OSError as error:
            return f"{compiler} cannot be run: {error}"
        made.replace(target)
    return ""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    target, *flags = sys.argv[1:] or (LIBRARY,)
    if problem := build(Path(target), tuple(flags)):
        sys.stderr.write(f"lorastack runs without native kernels: {problem}\n")
