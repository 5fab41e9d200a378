"""What Python code costs, as a number that no machine changes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")


def lines_run(work: Callable[[], Result]) -> tuple[Result, int]:
    """The result of a call, and how many lines of Python it ran, callees included.

    The garbage collector rests: what it calls is no cost of the work.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(trace)
    try:
        result = work()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
    return result, count
