"""A store that another process writes: what a reader sees, and when."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorastack.adapters.store import opening
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    LorastackError,
    NotFoundError,
    Reason,
)
from tests.adapters.folders import ONE, TWO, contents, reopen, specs_of, store


@pytest.fixture
def reader(registry: Registry, root: Path) -> Iterator[Registry]:
    """Opened beside the writer, after it stored "a"."""
    store(registry, "a", ONE)
    reader = Registry(root, read_only=True)
    yield reader
    reader.close()


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Path -> mtime and inode of every file and folder."""
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in (root, *root.rglob("*"))}


def test_a_reader_sees_what_the_writer_does(registry: Registry, reader: Registry) -> None:
    assert contents(reader, "a") == ONE
    assert not reader.refresh()
    first = registry.resolve("a")
    steps: list[Callable[[], object]] = [
        lambda: store(registry, "b", TWO),
        lambda: store(registry, "a", TWO),
        lambda: registry.rollback("a", first.digest),
        lambda: registry.set_default_medusa("b"),
        lambda: registry.delete("a"),
    ]
    for step in steps:
        step()
        assert reader.refresh()
        assert not reader.refresh()
        assert reader.list() == registry.list()
        assert reader.default_medusa() == registry.default_medusa()
        for record in reader.list():
            assert reader.revisions(record.id) == registry.revisions(record.id)
            reader.verify(record.digest)
    with pytest.raises(NotFoundError):
        reader.resolve("a")


def test_nothing_is_written(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    damaged = store(registry, "damaged", {"x.json": b"{}", "x.safetensors": b"x"}).digest
    registry.files(damaged)["x.safetensors"].write_bytes(b"y")
    upload = registry.begin_upload("b", specs_of(TWO))
    (root / "ids" / "c.json.tmp").write_bytes(b"half")
    (root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"orphan")
    (root / "manifests" / "broken.json").write_bytes(b"")
    before = everything(root)
    reader = Registry(root, read_only=True)
    calls: list[Callable[[], object]] = [
        lambda: reader.plan_upload("b", specs_of(TWO)),
        lambda: reader.begin_upload("b", specs_of(TWO)),
        lambda: reader.delete("a"),
        lambda: reader.rollback("a", digest),
        lambda: reader.set_default_medusa("a"),
    ]
    for call in calls:
        with pytest.raises(FailedPreconditionError) as refusal:
            call()
        assert refusal.value.reason is Reason.STORE_READ_ONLY
    reader.refresh()
    reader.verify(digest)
    with pytest.raises(DataLossError):
        reader.verify(damaged)
    reader.close()
    assert everything(root) == before
    assert reader.recovery.damaged == ("broken.json",)
    assert reader.recovery.kept_uploads == reader.recovery.removed_blobs == 0
    upload.abort()


def test_an_idle_refresh_reads_nothing(
    registry: Registry, reader: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("ids", "manifests"):
        os.utime(root / folder, (1e9, 1e9))
    assert not reader.refresh()  # the folders' times changed, their files did not

    def scandir(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    with monkeypatch.context() as patch:
        patch.setattr(opening.os, "scandir", scandir)
        assert not reader.refresh()


def test_a_change_within_the_clocks_tick_is_seen(registry: Registry, reader: Registry) -> None:
    """The folder's time may stay the same over two changes; a fresh one is not relied on."""
    ids = registry._root / "ids"
    store(registry, "b", TWO)
    reader.refresh()
    status = ids.stat()
    store(registry, "c", TWO)
    os.utime(ids, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reader.refresh()
    assert [record.id for record in reader.list()] == ["a", "b", "c"]


def test_damage_between_refreshes(registry: Registry, reader: Registry, root: Path) -> None:
    store(registry, "b", TWO)
    (root / "ids" / "a.json").unlink()
    (root / "ids" / "a.json").write_bytes(b"{")
    assert reader.refresh()
    with pytest.raises(DataLossError, match="'a'"):
        reader.resolve("a")
    assert [record.id for record in reader.list()] == ["b"]
    store(registry, "a", ONE)
    assert reader.refresh()
    assert contents(reader, "a") == ONE


def test_a_file_that_vanishes_while_it_is_read(
    registry: Registry, reader: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(registry, "b", TWO)
    parse = opening._parse_pointer

    def vanish(name: str, data: bytes) -> object:
        raise FileNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(reader._contents._table_files._pointers, "_parse", vanish)
        reader.refresh()
    assert [record.id for record in reader.list()] == ["a"]
    assert reader._contents._table_files._pointers._parse is parse
    assert reader.refresh()
    assert [record.id for record in reader.list()] == ["a", "b"]


def test_a_store_that_is_gone_for_a_while(registry: Registry, reader: Registry, root: Path) -> None:
    store(registry, "b", TWO)
    away = root.with_name("away")
    root.rename(away)
    assert not reader.refresh()
    assert [record.id for record in reader.list()] == ["a"]
    away.rename(root)
    assert reader.refresh()
    assert contents(reader, "b") == TWO


def test_deleted_under_a_reader_is_not_damage(registry: Registry, reader: Registry) -> None:
    digest = reader.resolve("a").digest
    registry.delete("a")
    with pytest.raises(NotFoundError, match=digest):
        reader.verify(digest)


@pytest.mark.parametrize("there", [False, True])
def test_no_store_there(root: Path, there: bool) -> None:
    if there:
        root.mkdir()
    with pytest.raises(FailedPreconditionError) as refusal:
        Registry(root, read_only=True)
    assert refusal.value.reason is Reason.STORE_FORMAT
    assert root.exists() == there


def test_a_store_that_cannot_be_written_says_how_to_read_it(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.close()
    real_open = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(30, "Read-only file system")
        return real_open(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(FailedPreconditionError, match="--read-only-store") as refusal:
            Registry(root)
    assert refusal.value.reason is Reason.STORE_READ_ONLY
    reopen(registry, root).close()


def test_readers_beside_a_busy_writer(registry: Registry, root: Path) -> None:
    """Whatever a reader lists at any moment is whole, or was deleted meanwhile."""
    reader = Registry(root, read_only=True)
    for turn in range(30):
        name = f"id-{turn % 3}"
        if turn % 4 == 3:
            registry.delete(registry.list()[0].id)
        else:
            store(registry, name, {"x.json": b"{}", "w.safetensors": bytes([turn % 5])})
        if turn % 2:
            reader.refresh()
        for record in reader.list():
            try:
                reader.verify(record.digest)
            except LorastackError as error:
                assert isinstance(error, NotFoundError), error
    shutil.rmtree(root / "ids")
    reader.refresh()
    reader.list()
    reader.close()
