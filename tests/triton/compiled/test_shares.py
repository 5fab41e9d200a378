"""What stage 1 of `benchmarks.gpu.check` compiles: all that the other stages launch, once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks.gpu import compiling
from benchmarks.gpu.setting import Setting
from tests.helpers.launches import KERNELS


def compiled(setting: Setting, part: int, parts: int) -> Counter[str]:
    found = Counter[str]()

    def report(name: str, kernel: Any, seconds: float) -> None:
        found[name] += 1

    assert compiling.share(setting, part, parts, report) == []
    return found


def test_shares_are_all_kernels_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walked through on a CPU, at tiny sizes; nothing is compiled."""
    monkeypatch.setattr(JITFunction, "warmup", lambda self, *args, **settings: self)
    setting = Setting(torch.device("cpu"), tiny=True)
    whole = compiled(setting, 0, 1)
    assert compiled(setting, 0, 2) + compiled(setting, 1, 2) == whole
    ours = {
        name
        for module in KERNELS
        for name, each in vars(module).items()
        if isinstance(each, JITFunction) and name.endswith("_kernel")
    }
    assert whole.keys() == ours
