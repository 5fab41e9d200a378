"""LORASTACK_ISA for peers: our server's limit in the words of the libraries that have one."""

from __future__ import annotations

# oneDNN computes for OpenVINO and torch. OpenVINO's own kernels have a variable too, which released
# builds did not read in 2026. torch's own kernels know no AVX512 with bfloat16.
ONEDNN = {"avx2": "AVX2", "avx512": "AVX512_CORE", "avx512-bf16": "AVX512_CORE_BF16"}
ATEN = {"avx2": "avx2", "avx512": "avx512", "avx512-bf16": "avx512"}


def limits(isa: str) -> dict[str, str]:
    """Environment variables for an instruction set; none where no library has a name for it."""
    if isa not in ONEDNN:
        return {}
    return {
        "ONEDNN_MAX_CPU_ISA": ONEDNN[isa],
        "OV_CPU_MAX_ISA": ONEDNN[isa],
        "ATEN_CPU_CAPABILITY": ATEN[isa],
    }
