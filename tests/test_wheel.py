"""What hatch_build.py tells hatchling of a wheel, with the native library and without."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from tests.test_layering import ROOT

INTERFACE = "hatchling.builders.hooks.plugin.interface"
FAKE = """
from pathlib import Path
LIBRARY = Path(__file__).with_name("liblorastack.so")
def build(): return {!r}
"""


class Interface(Generic[TypeVar("Config")]):
    """hatchling's, which is not installed here: it is fetched when a wheel is made."""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    interface = ModuleType(INTERFACE)
    interface.BuildHookInterface = Interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, INTERFACE, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def build_data(hook: ModuleType, root: Path, problem: str) -> tuple[dict[str, Any], list[str]]:
    """What the hook makes of hatchling's data, and its warnings."""
    file = root / hook.BUILD
    file.parent.mkdir(parents=True)
    file.write_text(FAKE.format(problem))
    warnings: list[str] = []
    made = hook.NativeBuildHook()
    made.root, made.app = str(root), SimpleNamespace(display_warning=warnings.append)
    data: dict[str, Any] = {"artifacts": [], "pure_python": True, "tag": None}
    made.initialize("standard", data)
    return data, warnings


def test_a_wheel_with_the_library_is_for_this_platform_and_any_python(
    hook: ModuleType, tmp_path: Path
) -> None:
    data, warnings = build_data(hook, tmp_path, "")
    assert not warnings and data["pure_python"] is False
    assert data["artifacts"] == [os.path.join(os.path.dirname(hook.BUILD), "liblorastack.so")]
    _, _, _, tags = parse_wheel_filename(f"lorastack-1-{data['tag']}.whl")
    (tag,) = tags
    assert (tag.interpreter, tag.abi) == ("py3", "none")
    assert tag in set(sys_tags()), "pip would not install it here"
    assert not tag.platform.startswith(("any", "manylinux", "musllinux"))


def test_a_wheel_without_it_is_for_every_machine(hook: ModuleType, tmp_path: Path) -> None:
    data, warnings = build_data(hook, tmp_path, "no C++ compiler")
    assert data == {"artifacts": [], "pure_python": True, "tag": None}
    assert warnings == ["no native kernels: no C++ compiler"]
