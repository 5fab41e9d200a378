"""Worker processes that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.workers import Sandbox


@pytest.fixture(scope="module")
def sandbox(tiny_llama: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(tiny_llama)
    with sandbox.runner:
        yield sandbox
        sandbox.run(sandbox.untrusted.close())
