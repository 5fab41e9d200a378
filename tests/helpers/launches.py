"""Triton's launches in tests: counted, timed, or sent elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lorastack.kernels.triton as package
from lorastack.kernels.triton import launch as launches

KERNELS = [
    importlib.import_module(f"{package.__name__}.{module.name}")
    for module in pkgutil.iter_modules(package.__path__)
]


@contextmanager
def launching(instead: Callable[..., Any]) -> Iterator[None]:
    """`instead` in place of `launch.launch`, wherever it was imported."""
    plain = launches.launch
    modules = [module for module in KERNELS if getattr(module, "launch", None) is plain]
    assert modules, "no kernels"
    patches = [patch.object(module, "launch", instead) for module in modules]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
