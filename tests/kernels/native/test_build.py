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
