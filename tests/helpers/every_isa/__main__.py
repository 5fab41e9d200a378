"""Compile a library whose AVX-512 and AMX kernels run on any x86-64 CPU with AVX2.

    python -m tests.helpers.every_isa TARGET

The kernels' sources are those of every build; only their intrinsics are others (avx512.h, amx.h).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorastack.kernels.native import build

HERE = Path(__file__).parent
_AVX2 = build.SOURCES["x86_64"]["avx2.cpp"]
_AVX512 = (*_AVX2, "-include", str(HERE / "avx512.h"))
_BF16 = ("-D__AVX512BF16__",)


def main(target: str) -> None:
    """Exits with the compiler's message if it fails."""
    build.SOURCES["x86_64"] |= {
        "dispatch.cpp": ("-include", str(HERE / "dispatch.h")),
        "avx512.cpp": _AVX512,
        "avx512_bf16.cpp": (*_AVX512, *_BF16),
        "amx.cpp": (*_AVX2, *_BF16, "-include", str(HERE / "amx.h")),
    }
    sys.exit(build.build(Path(target)) or 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
