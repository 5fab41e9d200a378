"""Tests of the Triton kernels and their backend: in the interpreter, or on a CUDA device.

`make check-triton` runs them in the interpreter, which Triton chooses once a process;
`pytest -m gpu` on the device. Without either they are left out. The folder `compiled` compiles
every kernel ahead of time, without a device, in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorastack.kernels.triton.launch import INTERPRETED
from tests.helpers import interpreter

HERE = Path(__file__).parent
RUNS = INTERPRETED or torch.cuda.is_available()

if INTERPRETED:
    interpreter.mend()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out what this process cannot run."""
    if collection_path.is_dir() or collection_path.name == "conftest.py":
        return None
    compiled = HERE / "compiled" in collection_path.parents
    if compiled and not INTERPRETED:
        return None
    return True if compiled or not RUNS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on the device is marked so."""
    for item in items:
        if HERE in item.path.parents and "compiled" not in item.path.parts and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
