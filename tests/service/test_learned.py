"""The server saves what its engine learns, at most now and then, and never into others' stores."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from lorastack.adapters.store import learned as learned_module
from lorastack.adapters.store.learned import Learned
from lorastack.client import Client
from lorastack.service.adapters import keeper as keeper_module
from lorastack.speculation.calibration import Calibration
from tests.helpers.live import wait_until
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer


def wise(accepted: bool = True) -> Calibration:
    calibration = Calibration()
    calibration.record(0, -0.5, accepted)
    return calibration


def saved(server: RunningServer) -> dict[str, str]:
    return dict(Learned(server.registry._root, server.registry.knows).texts)


def wait_for(server: RunningServer, texts: dict[str, str]) -> None:
    wait_until(lambda: saved(server) == texts, "it is saved")


def test_at_its_end(fake: RunningServer, client: Client, folders: dict[str, Path]) -> None:
    heads = client.upload(folders["heads"], "heads").digest
    fake.engine.learnt = {heads: wise(), "": Calibration(), "sha256:gone": wise()}
    client.close()
    fake.stop()
    assert saved(fake) == {heads: wise().to_json(), "": Calibration().to_json()}


def test_nothing_learnt_nothing_saved(fake: RunningServer) -> None:
    fake.stop()
    assert not list(fake.registry._root.glob("acceptance*"))


def test_now_and_then(start_fake: StartFake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "SAVE_SECONDS", 0.01)
    fake = start_fake()
    for calibration in (wise(), wise(accepted=False)):
        fake.engine.learnt = {"": calibration}
        wait_for(fake, {"": calibration.to_json()})


def test_a_store_of_others_is_left_alone(fake: RunningServer, start_fake: StartFake) -> None:
    root = fake.registry._root
    Learned(root, fake.registry.knows).save({"": wise().to_json()})
    reader = start_fake(store=root, read_only_store=True)
    before = written(root)
    reader.engine.learnt = {"": wise(accepted=False)}
    reader.stop()
    assert written(root) == before


def written(root: Path) -> dict[Path, tuple[int, int]]:
    """When, and how much."""
    stats = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


def test_a_full_disk_is_logged_and_tried_again(
    start_fake: StartFake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper_module, "SAVE_SECONDS", 0.01)
    fake = start_fake()
    attempts = []

    def refuse(path: Path, data: bytes) -> None:
        attempts.append(data)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(learned_module, "replace_file", refuse)
        fake.engine.learnt = {"": wise()}
        wait_until(lambda: len(attempts) > 1, "it is tried again")
    assert "No space left on device" in caplog.text
    wait_for(fake, {"": wise().to_json()})
