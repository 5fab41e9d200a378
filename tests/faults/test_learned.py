"""kill -9 and a full disk while what was learnt about heads is written."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

from lorastack.adapters.store.learned import Learned
from tests.faults.saving import is_ours, save_for_ever, states
from tests.faults.test_full_disk import Disk
from tests.helpers.live import wait_until
from tests.helpers.process import FORKS


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The file is that of one moment, whole."""
    moments = random.Random(0)
    for turn in range(10):
        root = tmp_path / str(turn)
        root.mkdir()
        writer = FORKS.Process(target=save_for_ever, args=(root,))
        writer.start()
        wait_until((root / "acceptance.json").exists, "it writes")
        time.sleep(moments.uniform(0, 0.01))
        writer.kill()
        writer.join()
        assert Learned(root, is_ours).texts in [states(turn) for turn in range(10)]


def save_on_a_full_disk(root: Path) -> None:
    """In a process of its own, whose exit code tells."""
    disk = Disk()
    learned = Learned(root, is_ours)
    for step in itertools.count():
        before, after = dict(learned.texts), states(step)
        with disk.filling(root, step):
            try:
                learned.save(after)
            except OSError:
                assert disk.was_full
        hindered = disk.was_full
        assert Learned(root, is_ours).texts in ((before, after) if hindered else (after,))
        learned.save({})
        assert Learned(root, is_ours).texts == after
        if not hindered:
            assert step > 1
            break


def test_full_at_every_step(tmp_path: Path) -> None:
    process = FORKS.Process(target=save_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
