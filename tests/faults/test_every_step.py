"""Killed before every single change of the disk: the store is as before, or as after (I5).

Each operation runs in a process that kills itself at its n-th look at a file of the store, for
every n until it comes through. Steps are the interpreter's own audit events, so they are those of
whatever code runs.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lorastack.adapters.store.registry import Registry
from tests.adapters.folders import sha256
from tests.faults.operations import OPERATIONS, ORPHAN, make_store, state_of, state_on_disk
from tests.faults.store_files import assert_whole
from tests.helpers.process import FORKS

STEPS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime")


def run_until_killed(root: Path, operation: str, step: int, acknowledged: Connection) -> None:
    """In a process of its own."""
    left = itertools.count(step, -1)

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event in STEPS and str(arguments[0]).startswith(str(root)) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    OPERATIONS[operation](Registry(root))
    acknowledged.send(True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_step(tmp_path: Path, operation: str) -> None:
    store = make_store(tmp_path / "store")
    registry = Registry(shutil.copytree(store, tmp_path / "undisturbed"))
    before = state_of(registry)
    OPERATIONS[operation](registry)
    after = state_of(registry)
    registry.close()
    for step in itertools.count():
        root = shutil.copytree(store, tmp_path / f"step-{step}")
        answer, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=run_until_killed, args=(root, operation, step, theirs))
        process.start()
        theirs.close()
        process.join()
        assert_whole(root)
        if process.exitcode == 0:
            with answer:
                assert answer.recv()
            assert state_on_disk(root) == after
            break
        assert process.exitcode == -signal.SIGKILL
        assert state_on_disk(root) in (before, after), f"killed at step {step}"
        assert_recovered(root)
        shutil.rmtree(root)
    assert step > 5, "the operation was not watched"


def assert_recovered(root: Path) -> None:
    """Opening it once has cleaned up."""
    assert not (root / "blobs" / "sha256" / sha256(ORPHAN)).exists()
    assert not list(root.rglob("*.tmp"))
