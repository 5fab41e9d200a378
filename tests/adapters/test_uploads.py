"""Uploads that fail, and uploads that break off and go on."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorastack.adapters.formats.parse import ParsedAdapter
from lorastack.adapters.store import staging
from lorastack.adapters.store.manifest import FileSpec
from lorastack.adapters.store.registry import Record, Registry, Upload
from lorastack.adapters.store.staging import STAGING_EXPIRES
from lorastack.errors import (
    AbortedError,
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
)
from tests.adapters.folders import (
    BLOB,
    ONE,
    TWO,
    accept,
    blob_names,
    contents,
    reopen,
    send,
    sha256,
    specs_of,
    staged,
    store,
)


@pytest.mark.parametrize(
    ("writes", "named"),
    [
        ([(0, BLOB[:-1])], "299 of 300 bytes"),
        ([(0, BLOB + b"x")], "longer than the announced 300"),
        ([(0, BLOB[:100]), (150, BLOB[150:])], "offset 150, but 100"),
        ([(0, BLOB[:100]), (0, BLOB[:100])], "offset 0, but 100"),
        ([(0, BLOB[:-1] + b"x")], "do not have sha256"),
        ([], "0 of 300 bytes"),
    ],
    ids=["short", "long", "gap", "again", "other", "nothing"],
)
def test_wrong_bytes(
    registry: Registry, root: Path, writes: list[tuple[int, bytes]], named: str
) -> None:
    upload = registry.begin_upload("a", specs_of(ONE))
    send(upload, [ONE["adapter_config.json"]])
    with pytest.raises(InvalidArgumentError, match=named):
        for offset, data in writes:
            upload.write(sha256(BLOB), offset, data)
        upload.commit(accept, base_fingerprint="base")
    upload.abort()
    assert registry.list() == []
    assert blob_names(root) == set()
    assert staged(root) == []


def test_a_refused_adapter_leaves_nothing(registry: Registry, root: Path) -> None:
    def refuse(files: Mapping[str, Path]) -> ParsedAdapter:
        assert {name: path.read_bytes() for name, path in files.items()} == ONE
        raise InvalidArgumentError("no good")

    upload = registry.begin_upload("a", specs_of(ONE))
    send(upload, list(ONE.values()))
    with pytest.raises(InvalidArgumentError, match="no good"):
        upload.commit(refuse, base_fingerprint="base")
    assert registry.list() == []
    assert blob_names(root) == set()
    assert staged(root) == []


GOOD = FileSpec(name="a.json", size=2, sha256=sha256(b"{}"))
BAD_FILES: dict[str, tuple[list[FileSpec], str]] = {
    "none": ([], "1 to 3 files"),
    "many": ([FileSpec(name=f"{n}.json", size=0, sha256="0" * 64) for n in range(4)], "1 to 3"),
    "folder": ([FileSpec(name="a/b.json", size=2, sha256="0" * 64)], "plain file name"),
    "parent": ([FileSpec(name="..", size=2, sha256="0" * 64)], "plain file name"),
    "backslash": ([FileSpec(name="a\\b", size=2, sha256="0" * 64)], "plain file name"),
    "nameless": ([FileSpec(name="", size=2, sha256="0" * 64)], "plain file name"),
    "newline": ([FileSpec(name="a\n", size=2, sha256="0" * 64)], "plain file name"),
    "surrogate": ([FileSpec(name="\udcff", size=2, sha256="0" * 64)], "plain file name"),
    "long": ([FileSpec(name="a" * 300, size=2, sha256="0" * 64)], "plain file name"),
    "twice": ([GOOD, GOOD], "same name"),
    "upper": ([FileSpec(name="a", size=2, sha256="A" * 64)], "sha256"),
    "traversal": ([FileSpec(name="a", size=2, sha256="../../../etc/passwd")], "sha256"),
    "negative": ([FileSpec(name="a", size=-1, sha256="0" * 64)], "size"),
    "two sizes": ([GOOD, FileSpec(name="b", size=3, sha256=GOOD.sha256)], "different sizes"),
    "large": ([FileSpec(name="a", size=1001, sha256="0" * 64)], "at most 1000"),
}


@pytest.mark.parametrize(("files", "named"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_announcements(root: Path, files: list[FileSpec], named: str) -> None:
    registry = Registry(root, max_files=3, max_upload=1000)
    for call in (registry.plan_upload, registry.begin_upload):
        with pytest.raises(InvalidArgumentError, match=named):
            call("a", files)
    assert staged(root) == []


def test_empty_files_need_no_chunks(registry: Registry) -> None:
    empty = ONE | {"empty.txt": b""}
    assert store(registry, "a", empty).size_bytes == 302
    assert contents(registry, "a") == empty


def test_a_full_disk(registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload = registry.begin_upload("a", specs_of(ONE))
    send(upload, list(ONE.values()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceExhaustedError) as refusal:
            upload.commit(accept, base_fingerprint="base")
    assert refusal.value.reason is Reason.STORE_FULL
    assert registry.list() == []
    assert staged(root) == []
    store(registry, "a", ONE)


# -- uploads that break off and go on -------------------------------------------------------------

CONFIG = ONE["adapter_config.json"]


def plan(registry: Registry, adapter_id: str, data: Mapping[str, bytes]) -> dict[str, int]:
    """File name -> bytes that are here, of what an upload needs."""
    needed = registry.plan_upload(adapter_id, specs_of(data))
    return {spec.name: offset for spec, offset in needed}


def begin_half(registry: Registry, adapter_id: str = "a") -> Upload:
    upload = registry.begin_upload(adapter_id, specs_of(ONE))
    upload.write(sha256(CONFIG), 0, CONFIG)
    upload.write(sha256(BLOB), 0, BLOB[:100])
    return upload


def finish(upload: Upload, start: int) -> Record:
    upload.write(sha256(BLOB), start, BLOB[start:])
    assert upload.num_missing == 0
    return upload.commit(accept, base_fingerprint="base")


@pytest.mark.parametrize("how", ["suspended", "killed"])
def test_an_upload_goes_on_where_it_broke_off(registry: Registry, root: Path, how: str) -> None:
    if how == "suspended":
        begin_half(registry).suspend()
    else:
        begin_half(registry)
        registry = reopen(registry, root)
        assert registry.recovery.kept_uploads == 1
    assert registry.list() == []
    assert plan(registry, "a", ONE) == {"adapter_config.json": 2, "adapter_model.safetensors": 100}
    upload = registry.begin_upload("a", specs_of(ONE))
    assert upload.staged == {sha256(CONFIG): 2, sha256(BLOB): 100}
    assert upload.num_missing == 200
    finish(upload, 100)
    assert contents(registry, "a") == ONE
    assert staged(root) == []
    registry.close()


def test_a_caller_may_know_of_fewer_bytes_than_are_here(registry: Registry) -> None:
    begin_half(registry).suspend()
    upload = registry.begin_upload("a", specs_of(ONE))
    upload.write(sha256(BLOB), 40, BLOB[40:120])
    with pytest.raises(InvalidArgumentError, match="offset 40, but 120"):  # within one stream
        upload.write(sha256(BLOB), 40, BLOB[40:])
    finish(upload, 120)
    assert contents(registry, "a") == ONE


def test_only_the_same_upload_of_the_same_id_goes_on(registry: Registry) -> None:
    begin_half(registry).suspend()
    fresh = {"adapter_config.json": 0, "adapter_model.safetensors": 0}
    assert plan(registry, "b", ONE) == fresh
    assert plan(registry, "a", ONE | {"README.md": b"?"}) == {**fresh, "README.md": 0}
    renamed = {"other.json": CONFIG, "adapter_model.safetensors": BLOB}
    assert set(plan(registry, "a", renamed).values()) == {0}
    assert plan(registry, "a", dict(reversed(ONE.items())))["adapter_model.safetensors"] == 100


def test_staged_bytes_are_not_trusted(registry: Registry, root: Path) -> None:
    upload = begin_half(registry)
    path = upload.staging.path(sha256(BLOB))
    upload.suspend()
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(InvalidArgumentError, match="do not have sha256"):
        finish(registry.begin_upload("a", specs_of(ONE)), 100)
    assert registry.list() == []
    assert staged(root) == []  # so that the next try starts over
    finish(begin_half(registry), 100)


def test_staged_bytes_that_are_too_many_count_as_none(registry: Registry) -> None:
    upload = begin_half(registry)
    path = upload.staging.path(sha256(BLOB))
    upload.suspend()
    path.write_bytes(BLOB + b"x")
    assert plan(registry, "a", ONE)["adapter_model.safetensors"] == 0
    finish(registry.begin_upload("a", specs_of(ONE)), 0)
    assert contents(registry, "a") == ONE


def test_a_later_upload_takes_over(registry: Registry) -> None:
    older = begin_half(registry)
    newer = registry.begin_upload("a", specs_of(ONE))
    for call in (
        lambda: older.write(sha256(BLOB), 100, BLOB[100:]),
        lambda: older.commit(accept, base_fingerprint="base"),
    ):
        with pytest.raises(AbortedError) as refusal:
            call()
        assert refusal.value.reason is Reason.UPLOAD_TAKEN_OVER
    older.abort()  # takes nothing from the newer one
    finish(newer, 100)
    assert contents(registry, "a") == ONE


def test_a_later_upload_waits_for_a_commit(registry: Registry) -> None:
    validating, go_on = threading.Event(), threading.Event()

    def slow(files: Mapping[str, Path]) -> ParsedAdapter:
        validating.set()
        assert go_on.wait(10)
        return accept(files)

    first = begin_half(registry)
    first.write(sha256(BLOB), 100, BLOB[100:])
    with ThreadPoolExecutor(2) as threads:
        commit = threads.submit(first.commit, slow, base_fingerprint="base")
        assert validating.wait(10)
        later = threads.submit(registry.begin_upload, "a", specs_of(ONE))
        go_on.set()
        record = commit.result(10)
        assert later.result(10).needed == frozenset()
        assert later.result().commit(accept, base_fingerprint="base") == record


def test_an_aborted_upload_starts_over(registry: Registry, root: Path) -> None:
    begin_half(registry).abort()
    assert staged(root) == []
    assert plan(registry, "a", ONE) == {"adapter_config.json": 0, "adapter_model.safetensors": 0}


def age(root: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (root / "staging").rglob("*"):
        os.utime(path, (then, then))


def test_staged_bytes_expire(registry: Registry, root: Path) -> None:
    begin_half(registry).suspend()
    age(root, STAGING_EXPIRES - 60)
    registry = reopen(registry, root)
    assert (registry.recovery.kept_uploads, registry.recovery.expired_uploads) == (1, 0)
    age(root, STAGING_EXPIRES + 60)
    registry = reopen(registry, root)
    assert (registry.recovery.kept_uploads, registry.recovery.expired_uploads) == (0, 1)
    assert staged(root) == []
    registry.close()


def test_staged_bytes_expire_while_the_server_runs(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_half(registry).suspend()
    running = begin_half(registry, "running")
    assert registry.expire_uploads() == 0
    monkeypatch.setattr(staging, "STAGING_EXPIRES", -1.0)
    assert registry.expire_uploads() == 1
    assert len(staged(root)) == 1
    finish(running, 100)
    assert registry.staging_bytes() == 0


def test_stored_meanwhile(registry: Registry, root: Path) -> None:
    """Another id brought the bytes while an upload waited, or ran."""
    begin_half(registry).suspend()
    running = registry.begin_upload("b", specs_of(ONE))
    store(registry, "c", ONE)
    assert plan(registry, "a", ONE) == {}
    resumed = registry.begin_upload("a", specs_of(ONE))
    assert resumed.needed == frozenset()
    resumed.write(sha256(BLOB), 100, BLOB[100:])  # planned before: dropped
    for upload in (resumed, running):
        send(upload, list(ONE.values()))
        upload.commit(accept, base_fingerprint="base")
    assert contents(registry, "a") == contents(registry, "b") == ONE
    assert staged(root) == []


# -- which bytes count as present -----------------------------------------------------------------


def test_bytes_that_merely_lie_there_are_not_present(registry: Registry, root: Path) -> None:
    (root / "blobs" / "sha256" / sha256(BLOB)).write_bytes(BLOB)
    assert "adapter_model.safetensors" in plan(registry, "a", ONE)


def test_bytes_of_a_deleted_adapter_are_not_present(registry: Registry) -> None:
    digest = store(registry, "a", ONE).digest
    assert plan(registry, "b", ONE) == {}
    registry.delete("a", in_use={digest})
    registry.verify(digest)  # still there
    assert plan(registry, "b", ONE).keys() == ONE.keys()
    store(registry, "b", ONE)
    assert contents(registry, "b") == ONE


def test_bytes_of_an_earlier_revision_are_present(registry: Registry) -> None:
    store(registry, "a", ONE)
    store(registry, "a", TWO)
    assert plan(registry, "b", ONE) == {}


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_bytes_that_are_gone_are_not_present(registry: Registry, damage: str) -> None:
    path = registry.files(store(registry, "a", ONE).digest)["adapter_model.safetensors"]
    path.unlink()
    if damage == "cut":
        path.write_bytes(BLOB[:-1])
    assert plan(registry, "b", ONE) == {"adapter_model.safetensors": 0}
    store(registry, "b", ONE)
    assert contents(registry, "a") == ONE  # and whole again
