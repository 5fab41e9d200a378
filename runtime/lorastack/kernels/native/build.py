"""Compile the native library with the system's C++ compiler.

    python -m lorastack.kernels.native.build [TARGET FLAG...]

TARGET and FLAGs make another library, for tests (see `make check-native`).

Each source is compiled for its own instruction set, and `dispatch.cpp` chooses among them when the
program runs, so a library runs on any machine of the architecture that it was compiled on.
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
_ANY: dict[str, tuple[str, ...]] = {"dispatch.cpp": (), "plain.cpp": ()}
# The least instructions first: of an inline function that several objects hold, such as one of
# std::vector, the linker keeps the first.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
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
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra"),
)
# GCC's own intrinsics raise the first warning, vectors as template arguments the second.
_QUIET = ("-Wno-maybe-uninitialized", "-Wno-ignored-attributes")


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
    flags_of = SOURCES.get(platform.machine(), _ANY)
    if compiler is None:
        return NO_COMPILER
    named = f'-DLORASTACK_SOURCES="{sources()}"'
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compiled(name: str) -> str:
            output = str(Path(folder, name).with_suffix(".o"))
            flags = (*_FLAGS, *_QUIET, *flags_of[name], named, *extra)
            _run(compiler, *flags, "-c", str(HERE / name), "-o", output)
            return output

        try:
            objects = list(pool.map(compiled, flags_of))
            made = target.with_suffix(f".{os.getpid()}")  # the old one may be mapped
            _run(compiler, "-shared", "-fopenmp", *extra, *objects, "-o", str(made))
        except subprocess.CalledProcessError as error:
            return f"{compiler} failed:\n{error.stderr}"
        except OSError as error:
            return f"{compiler} cannot be run: {error}"
        made.replace(target)
    return ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    target, *flags = sys.argv[1:] or (LIBRARY,)
    if problem := build(Path(target), tuple(flags)):
        sys.stderr.write(f"lorastack runs without native kernels: {problem}\n")
