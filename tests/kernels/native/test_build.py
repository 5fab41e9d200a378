import platform
import sys
from pathlib import Path

import pytest

from lorastack.kernels.native.build import build


def test_a_failing_compiler_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("machine", "system"), [("aarch64", "linux"), ("x86_64", "darwin")])
def test_other_machines_are_told_and_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, system: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    assert build(tmp_path / "library.so") == f"no native kernels for {machine} {system}"
    assert not list(tmp_path.iterdir())
