"""A disk that is full: RESOURCE_EXHAUSTED, nothing stored half, and all is well once it is not.

At the store: the disk fills up at the n-th step of an operation, for every n. At a server: the
system refuses files above a size.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.store.registry import Registry
from lorastack.client import Client
from lorastack.config import KIB
from lorastack.errors import Reason, ResourceExhaustedError
from tests.faults.conftest import Configure
from tests.faults.operations import OPERATIONS, make_store, state_of, state_on_disk
from tests.helpers.live import ask
from tests.helpers.process import FORKS, ServerProcess

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Of a process of its own: once filled up, files of a folder cannot be written or synced."""

    def __init__(self) -> None:
        self._root = ""
        self._left = 0
        self.was_full = False
        self._fsync = os.fsync
        os.fsync = self._sync
        sys.addaudithook(self._watch)

    @contextmanager
    def filling(self, root: Path, steps: int) -> Iterator[None]:
        """It takes so many steps, and no more."""
        self._root, self._left, self.was_full = str(root), steps, False
        try:
            yield
        finally:
            self._root = ""

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.mkdir" or (event == "open" and int(str(arguments[2])) & WRITES):
            self._step(str(arguments[0]))

    def _sync(self, fd: Any) -> None:
        self._step(os.readlink(f"/proc/self/fd/{fd}"))
        self._fsync(fd)

    def _step(self, path: str) -> None:
        if not self._root or not path.startswith(self._root):
            return
        if self._left == 0:
            self.was_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self._left -= 1


def run_on_a_full_disk(store: Path, name: str) -> None:
    """In a process of its own, whose exit code tells."""
    disk = Disk()
    for step in itertools.count():
        root = shutil.copytree(store, store.with_name(f"step-{step}"))
        registry = Registry(root)
        before = state_of(registry)
        with disk.filling(root, step):
            try:
                OPERATIONS[name](registry)
            except ResourceExhaustedError as error:
                assert error.reason is Reason.STORE_FULL
                assert disk.was_full
        hindered, state = disk.was_full, state_of(registry)
        reader = Registry(root, read_only=True)
        assert state_of(reader) == state, "it forgot what the disk says"
        reader.close()
        OPERATIONS[name](registry)
        after = state_of(registry)
        assert state in ((before, after) if hindered else (after,)), step
        registry.close()
        assert state_on_disk(root) == after
        shutil.rmtree(root)
        if not hindered:
            break


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("nothing", "delete")])
def test_full_at_every_step(tmp_path: Path, name: str) -> None:
    process = FORKS.Process(target=run_on_a_full_disk, args=(make_store(tmp_path / "store"), name))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_an_upload_that_does_not_fit(configure: Configure, canaries: dict[str, Path]) -> None:
    """The server says so, goes on serving, and takes what fits."""
    config = configure()
    largest = max(path.stat().st_size for path in canaries["owl"].iterdir())
    with (
        ServerProcess(config, max_file_bytes=largest + KIB) as server,
        Client(server.address) as client,
    ):
        client.upload(canaries["owl"], "small")
        for adapter_id in ("large", "small"):
            with pytest.raises(ResourceExhaustedError) as refusal:
                client.upload(canaries["zephyr"], adapter_id)
            assert refusal.value.reason is Reason.STORE_FULL
        assert [adapter.id for adapter in client.list_adapters()] == ["small"]
        said = client.generate(ask("7", stack=[("small", 1.0)], max_new_tokens=6))
        assert said.text == "owlowl"
        client.upload(canaries["bat"], "another")
    assert list((config.adapters.store / "staging").rglob("*")) == []
    with ServerProcess(config) as server, Client(server.address) as client:
        client.upload(canaries["zephyr"], "large")
        assert [a.id for a in client.list_adapters()] == ["another", "large", "small"]
