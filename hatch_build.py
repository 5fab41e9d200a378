"""Builds the native library into wheels and editable installs where there is a C++ compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

BUILD = "runtime/lorastack/kernels/native/build.py"


class NativeBuildHook(BuildHookInterface[Any]):
    """Warns if the build fails: without a library the package runs in plain torch, anywhere."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root, BUILD))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if problem := module.build():
            self.app.display_warning(f"no native kernels: {problem}")
            return
        library = module.LIBRARY.relative_to(self.root)
        build_data["artifacts"].append(str(library))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{own_platform()}"  # ctypes loads it into any Python


def own_platform() -> str:
    """This machine's tag; manylinux would promise an older C library than it was linked with."""
    portable = ("manylinux", "musllinux")
    return next(tag for tag in platform_tags() if not tag.startswith(portable))
