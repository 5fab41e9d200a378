"""Environments of other projects' clients, which cannot share ours."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorastack.config import cache_dir

# It needs huggingface-hub below 1.0.
LORAX = ("lorax-0.6.3", ("lorax-client==0.6.3", "huggingface-hub<1"))
INSTALL_PATIENCE = 900.0
PATIENCE = 300.0
CALLS = Path(__file__).parents[1] / "gateway" / "clients" / "lorax_calls.py"


def lorax_python() -> Path:
    """The interpreter of an environment with the published lorax-client, made at first use.

    Several test processes may ask at once. Fails the test if the packages cannot be had.
    """
    name, requirements = LORAX
    folder = cache_dir() / "test-clients" / name
    folder.mkdir(parents=True, exist_ok=True)
    complete, python = folder / "complete", folder / "venv" / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            _run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], name)
            _run([str(python), "-m", "pip", "install", "--quiet", *requirements], name)
            complete.touch()
    return python


def lorax_calls(base_url: str, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the published lorax-client gets: see `tests/gateway/clients/lorax_calls.py`."""
    done = run_in(lorax_python(), [str(CALLS), base_url], json.dumps(cases))
    replies: list[dict[str, Any]] = json.loads(done)
    return replies


def run_in(python: Path, words: Sequence[str], given: str = "") -> str:
    """The output of a script in another environment. Fails the test if the script fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *words],
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, f"{words[0]} failed:\n{done.stderr[-4000:]}"
    return done.stdout


def _run(words: Sequence[str], name: str) -> None:
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=INSTALL_PATIENCE, check=False
    )
    if done.returncode:
        pytest.fail(
            f"the environment {name} for a foreign client could not be made; this test needs a "
            f"package index (`{' '.join(words)}`):\n{(done.stdout + done.stderr)[-2000:]}"
        )
