from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorastack.kernels.native import build as module
from lorastack.kernels.native.build import build
from lorastack.kernels.native.library import problem

RECORDER = """#!/bin/sh
[ "$1" = -dumpmachine ] && echo {machine}-unknown-linux && exit
echo "$@" >> {log}
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.mark.parametrize(("compiler", "told"), [("false", "failed"), ("/no/c++", "cannot be run")])
def test_a_failing_compiler_is_told_and_leaves_nothing(
    compiler: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert f"{compiler} {told}" in build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "library.so")
    remedy = "no C++ compiler: install g++, or name one in CXX"
    assert build() == remedy
    assert problem().startswith(f"the native library is not built; {remedy}, then build it with `")
    assert not list(tmp_path.iterdir())


def flags_of(machine: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Source -> the instructions that the compiler may use for it, in the order of linking."""
    compiler, log = folder / "compiler", folder / "log"
    compiler.write_text(RECORDER.format(log=log, machine=machine))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build(folder / "library.so") == ""
    *compiled, linked = sorted(
        (line.split() for line in log.read_text().splitlines()), key=lambda call: "-c" not in call
    )
    found = {
        Path(call[call.index("-c") + 1]).stem: {flag for flag in call if flag.startswith("-m")}
        for call in compiled
    }
    return {Path(word).stem: found[Path(word).stem] for word in linked if word.endswith(".o")}


def test_a_library_is_for_every_machine_of_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs before the choice, and PLAIN, is compiled for any of them. Of an inline function
    that several sources hold, the linker keeps the first one's: it must run where the others do."""
    flags = flags_of("x86_64", tmp_path, monkeypatch)
    assert list(flags) == ["dispatch", "plain", "avx2", "avx512", "avx512_bf16", "amx"]
    assert flags["dispatch"] == flags["plain"] == set()
    assert flags["avx2"] == {"-mavx2", "-mfma"}
    assert flags["avx512"] < flags["avx512_bf16"] < flags["amx"]


def test_other_architectures_get_plain_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flags_of("riscv64", tmp_path, monkeypatch) == {"dispatch": set(), "plain": set()}


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_arm_has_its_own_sources(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of(machine, tmp_path, monkeypatch)
    assert list(flags) == ["dispatch", "plain", "neon", "neon_bf16"]
    assert flags["neon"] == set() and flags["neon_bf16"] == {"-march=armv8.2-a+bf16"}
