from pathlib import Path

import pytest

from lorastack.kernels.native.build import build

ANY, ARM = {"dispatch.cpp", "plain.cpp"}, {"neon.cpp", "neon_bf16.cpp"}
X86 = {"avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp"}
# Says what it compiles for, notes what it is given and makes empty files.
COMPILER = """#!/bin/sh
if [ "$1" = -dumpmachine ]; then echo {target}; exit; fi
echo "$@" >> {log}
for output; do :; done
: > "$output"
"""


def test_a_failing_compiler_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "sources"),
    [
        ("x86_64-linux-gnu", ANY | X86),
        ("aarch64-linux-gnu", ANY | ARM),
        ("arm64-apple-darwin23.1.0", ANY | ARM),
        ("riscv64-linux-gnu", ANY),
    ],
)
def test_a_library_has_the_kernels_of_what_the_compiler_compiles_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, sources: set[str]
) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(COMPILER.format(target=target, log=log))
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert build(tmp_path / "library.so") == ""
    assert {Path(word).name for word in log.read_text().split() if word.endswith(".cpp")} == sources
    assert (tmp_path / "library.so").exists()
