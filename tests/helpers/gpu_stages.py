"""Stages that end as stages may: cases for `benchmarks.gpu.stages` in which things go wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from benchmarks.gpu.record import Cases, Finding


def cases(setting: object) -> Cases:
    """Which of them, the environment says."""
    return {name: _CASES[name] for name in os.environ["GPU_STAGE_CASES"].split()}


def _sound() -> Iterator[Finding]:
    yield Finding("what was found", 3, "things", least=2)


def _missed() -> Iterator[Finding]:
    yield Finding("what was found", 1, "things", least=2)


def _raises() -> Iterator[Finding]:
    yield Finding("before it", 1)
    raise ValueError("no such thing")


def _dies() -> Iterator[Finding]:
    yield Finding("before it", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs() -> Iterator[Finding]:
    yield Finding("before it", 1)
    time.sleep(3600)


_CASES: Cases = {
    "sound": _sound,
    "missed": _missed,
    "raises": _raises,
    "dies": _dies,
    "hangs": _hangs,
}
