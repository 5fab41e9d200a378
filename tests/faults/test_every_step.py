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
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lorastack.adapters.manifest import Record
from lorastack.adapters.registry import Registry
from tests.adapters.folders import sha256, store
from tests.faults.store_files import assert_whole
from tests.helpers.process import FORKS

ONE = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1" * 3000}
TWO = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"2" * 3000}
STEPS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime")

Digests = dict[str, str]  # of every listed id


def upload(registry: Registry) -> None:
    store(registry, "new", TWO)


def replace(registry: Registry) -> None:
    store(registry, "old", TWO)


def repeat(registry: Registry) -> None:
    store(registry, "old", ONE)


def delete(registry: Registry) -> None:
    registry.delete("old")


def nothing(registry: Registry) -> None:
    """Opening the store, which recovers it, is what is killed."""


OPERATIONS: dict[str, Callable[[Registry], None]] = {
    operation.__name__: operation for operation in (upload, replace, repeat, delete, nothing)
}


def run_until_killed(root: Path, operation: str, step: int, acknowledged: Connection) -> None:
    """In a process of its own."""
    left = itertools.count(step, -1)

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event in STEPS and str(arguments[0]).startswith(str(root)) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    OPERATIONS[operation](Registry(root))
    acknowledged.send(True)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A store of two ids, with what earlier kills left behind."""
    root = tmp_path / "before"
    registry = Registry(root)
    store(registry, "old", ONE)
    store(registry, "other", ONE | {"README.md": b"other"})
    registry.close()
    orphan = b"of an upload that was never published"
    (root / "blobs" / "sha256" / sha256(orphan)).write_bytes(orphan)
    (root / "ids" / "half.json.tmp").write_bytes(b'{"id"')
    return root


def digests(root: Path) -> Digests:
    """Opens the store, verifies every byte of it, and closes it."""
    registry = Registry(root)
    try:
        assert registry.recovery.damaged == ()
        found: list[Record] = registry.list()
        for record in found:
            registry.verify(record.digest)
        return {record.id: record.digest for record in found}
    finally:
        registry.close()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_step(tmp_path: Path, before: Path, operation: str) -> None:
    after = tmp_path / "after"
    shutil.copytree(before, after)
    registry = Registry(after)
    OPERATIONS[operation](registry)
    registry.close()
    expected = [digests(after), digests(shutil.copytree(before, tmp_path / "intact"))]
    for step in itertools.count():
        root = shutil.copytree(before, tmp_path / f"step-{step}")
        answer, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=run_until_killed, args=(root, operation, step, theirs))
        process.start()
        theirs.close()
        process.join()
        with answer:
            acknowledged = answer.poll() and not process.exitcode
        assert_whole(root)
        assert digests(root) in expected[: 1 if acknowledged else 2], f"killed at step {step}"
        if acknowledged:
            break
        assert process.exitcode == -signal.SIGKILL
        assert_recovered(root)
        shutil.rmtree(root)
    assert step > 5, "the operation was not watched"


def assert_recovered(root: Path) -> None:
    """Nothing is left that a second start would have to clean up."""
    known = {path.name for path in (root / "blobs" / "sha256").iterdir()}
    assert sha256(b"of an upload that was never published") not in known
    assert not list(root.rglob("*.tmp"))
