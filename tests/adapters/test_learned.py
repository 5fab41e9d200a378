"""What was learnt about heads, on disk: kept over restarts, bounded, harmless when damaged."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.store import learned as learned_module
from lorastack.adapters.store.fsck import check_store
from lorastack.adapters.store.learned import Learned
from lorastack.adapters.store.registry import Registry
from tests.adapters.folders import ONE, TWO, store

NAME = "acceptance.json"


def anything(digest: str) -> bool:
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_it_survives_a_restart(folder: Path) -> None:
    first = Learned(folder, anything)
    assert first.texts == {}
    first.save({"": '{"a": 1}', "x": "old", "y": "yes"})
    first.save({"x": "new"})
    assert Learned(folder, anything).texts == {"": '{"a": 1}', "y": "yes", "x": "new"}


def test_what_has_not_changed_is_not_written(folder: Path) -> None:
    learned = Learned(folder, anything)
    learned.save({})
    assert not (folder / NAME).exists()
    learned.save({"x": "1"})
    before = (folder / NAME).stat()
    learned.save({"x": "1"})
    Learned(folder, anything).save({})
    assert (folder / NAME).stat() == before


def test_deleted_adapters_drop_out(registry: Registry, root: Path) -> None:
    kept, gone = store(registry, "kept", ONE).digest, store(registry, "gone", TWO).digest
    learned = Learned(root, registry.knows)
    learned.save({"": "", kept: "1", gone: "2"})
    registry.delete("gone")
    assert Learned(root, registry.knows).texts == {"": "", kept: "1"}
    learned.save({})
    assert json.loads((root / NAME).read_bytes()) == {"": "", kept: "1"}
    store(registry, "kept", TWO)  # the older revision may come back
    assert Learned(root, registry.knows).texts == {"": "", kept: "1"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"": "cut',
        b"[]",
        b'{"": 1, "x": "good"}',
        b'{"x": "1", "x": "2"}',
        b"\xff",
        b'{"": "' + b"0" * (4 * learned_module.MAX_BYTES) + b'"}',
    ],
    ids=lambda data: str(data[:20]),
)
def test_a_damaged_file_counts_as_none(
    folder: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / NAME).write_bytes(data)
    learned = Learned(folder, anything)
    assert learned.texts == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert NAME in caplog.text
    learned.save({"x": "1"})
    assert Learned(folder, anything).texts == {"x": "1"}


def test_a_file_that_cannot_be_read_counts_as_none(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / NAME).mkdir()
    assert Learned(folder, anything).texts == {}
    assert NAME in caplog.text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.text('x"\\', max_size=12)), max_size=20))
def test_it_keeps_the_newest_that_fit(changes: list[tuple[str, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patch.setattr(learned_module, "MAX_BYTES", 30)
        learned = Learned(folder, anything)
        newest: dict[str, str] = {}
        for digest, text in changes:
            newest.pop(digest, None)
            newest[digest] = text
            learned.save({digest: text})
        kept = dict(learned.texts)
        assert len(kept) >= min(len(newest), 2)
        assert list(newest.items())[len(newest) - len(kept) :] == list(kept.items())
        assert sum(len(digest) + len(text) for digest, text in kept.items()) <= 30
        assert Learned(folder, anything).texts == kept


def test_damage_of_it_is_no_damage_of_the_store(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    Learned(root, registry.knows).save({digest: "1"})
    sound = check_store(root, lambda done, total: None)
    (root / NAME).write_bytes(b"{")
    assert check_store(root, lambda done, total: None) == sound
    assert (sound.damaged, sound.orphans) == ((), ())
    assert Registry(root, read_only=True).recovery.damaged == ()
