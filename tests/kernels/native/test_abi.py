"""Python and the library mean the same structs; a library that does not is refused, not called."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lorastack.kernels.native import build
from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa
from lorastack.kernels.native.library import FUNCTIONS, STRUCTS, library, problem
from lorastack.kernels.quantize import STORED, Kind

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
ABI = (build.HERE / "abi.h").read_text()
SIZES = [ctypes.sizeof(struct) for struct in STRUCTS]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_text(text: str, output: Path, *flags: str) -> None:
    assert COMPILER is not None
    source = output.with_suffix(".cpp")
    source.write_text(text)
    command = [COMPILER, "-std=c++17", f"-I{build.HERE}", *flags, str(source), "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)


def struct_names() -> list[str]:
    """Of abi.h, in its order."""
    return re.findall(r"^struct (lorastack_\w+) {", ABI, re.MULTILINE)


def test_every_struct_and_function_is_mirrored() -> None:
    snake = [re.sub(r"(?<!^)([A-Z])", r"_\1", struct.__name__).lower() for struct in STRUCTS]
    assert struct_names() == [f"lorastack_{name}" for name in snake]
    assert sorted(re.findall(r"\b(lorastack_\w+)\(", ABI)) == sorted(FUNCTIONS)


def test_fields_and_constants_agree(tmp_path: Path) -> None:
    asserts = [
        f"sizeof({name}) == {size}" for name, size in zip(struct_names(), SIZES, strict=True)
    ]
    for name, struct in zip(struct_names(), STRUCTS, strict=True):
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            asserts.append(f"offsetof({name}, {field}) == {place.offset}")
            asserts.append(f"sizeof({name}::{field}) == {place.size}")
    names = {Isa.PLAIN: "PLAIN_CPP"}  # PLAIN is a way of storing weights
    asserts += [f"LORASTACK_{names.get(isa, isa.name)} == {isa.value}" for isa in Isa]
    asserts.append(f"LORASTACK_NUM_ISAS == {len(Isa)}")
    asserts += [
        f"LORASTACK_{kind.name if kind else 'PLAIN'} == {STORED[kind]}" for kind in (None, *Kind)
    ]
    lines = [f'static_assert({each}, "");' for each in asserts]
    text = "\n".join(["#include <stddef.h>", '#include "abi.h"', *lines])
    compile_text(text, tmp_path / "fields.o", "-c")


def fake(folder: Path, sources: str | None, sizes: list[int]) -> Path:
    """A library with all functions, which end the process, and what the guard reads."""
    functions = "".join(f"void {name}() {{ __builtin_trap(); }}\n" for name in FUNCTIONS)
    numbers = ", ".join(map(str, sizes))
    constants = f'extern const char lorastack_sources[] = "{sources}";\n'
    constants += f"extern const int lorastack_sizes[] = {{{numbers}}};\n"
    path = folder / "fake.so"
    text = f'extern "C" {{\n{functions}{"" if sources is None else constants}}}\n'
    compile_text(text, path, "-w", "-shared", "-fPIC")
    return path


def test_a_library_of_these_sources_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LIBRARY", fake(tmp_path, build.sources(), SIZES))
    assert library() is not None


@pytest.mark.parametrize(
    ("sources", "sizes", "reason"),
    [
        (None, [], "of another version"),
        ("0" * 64, SIZES, "built from other sources"),
        (build.sources(), [*SIZES[:-1], SIZES[-1] + 8], "structs have other sizes"),
    ],
)
def test_any_other_is_refused_with_the_remedy(
    sources: str | None,
    sizes: list[int],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(build, "LIBRARY", fake(tmp_path, sources, sizes))
    with caplog.at_level(logging.WARNING, native.__name__):
        assert library() is None
        assert library() is None
    (record,) = caplog.records
    why = problem()
    assert why in record.getMessage()
    assert reason in why and "python -m lorastack.kernels.native.build" in why


def test_a_broken_file_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "broken.so")
    build.LIBRARY.write_bytes(b"no library")
    assert "cannot be loaded" in problem()


def test_a_build_names_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(build.HERE, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(build, "HERE", sources)
    monkeypatch.setitem(build.SOURCES, platform.machine(), {"dispatch.cpp": ()})  # the fastest
    assert build.build(tmp_path / "one.so") == ""
    first = build.sources()
    assert first.encode() in (tmp_path / "one.so").read_bytes()
    with (sources / "quantised.h").open("a") as file:
        file.write("// changed\n")
    assert build.sources() != first
    (sources / "quantised.h").unlink()
    assert build.sources() != first
