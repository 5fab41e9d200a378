"""What a store does about damaged files, and about crashes at every step."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.store import durable
from lorastack.adapters.store.fsck import check_store
from lorastack.adapters.store.manifest import adapter_digest
from lorastack.adapters.store.registry import Recovery, Registry
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    Reason,
)
from tests.adapters.folders import (
    BLOB,
    ONE,
    TWO,
    blob_names,
    contents,
    reopen,
    sha256,
    specs_of,
    staged,
    store,
)


def test_a_damaged_blob_is_named(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    other = store(registry, "b", TWO).digest
    path = registry.files(digest)["adapter_model.safetensors"]
    path.write_bytes(path.read_bytes().replace(b"o", b"0", 1))
    with pytest.raises(DataLossError, match=path.name):
        registry.verify(digest)
    registry.verify(other)
    path.unlink()
    with pytest.raises(DataLossError, match=path.name):
        registry.verify(digest)
    registry.delete("a")
    store(registry, "a", ONE)
    registry.verify(digest)


@pytest.mark.parametrize("restart", [False, True])
def test_an_upload_heals_what_ids_share(registry: Registry, root: Path, restart: bool) -> None:
    digest = store(registry, "a", ONE).digest
    store(registry, "b", ONE)
    path = registry.files(digest)["adapter_model.safetensors"]
    damaged = path.read_bytes().replace(b"o", b"0", 1)
    path.write_bytes(damaged)
    with pytest.raises(DataLossError, match="upload the adapter again"):
        registry.verify(digest)
    assert path.read_bytes() == damaged  # not ours to throw away
    registry = reopen(registry, root) if restart else registry
    ((spec, _),) = registry.plan_upload("a", specs_of(ONE))
    assert spec.sha256 == path.name
    assert store(registry, "a", ONE).revision == 1
    registry.verify(digest)
    assert contents(registry, "b") == ONE
    assert registry.plan_upload("c", specs_of(ONE)) == ()
    registry.close()


def test_an_upload_that_counts_on_damaged_bytes(registry: Registry) -> None:
    """It is not built on sand; the next one brings them."""
    digest = store(registry, "a", ONE).digest
    path = registry.files(digest)["adapter_model.safetensors"]
    path.write_bytes(path.read_bytes().replace(b"o", b"0", 1))
    with pytest.raises(DataLossError, match=path.name):
        store(registry, "b", ONE)
    store(registry, "b", ONE)
    registry.verify(digest)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"id": "b", "revisions": []}',
        b'{"id": "a", "revisions": [{"revision": 1, "digest": "d", "created_at": 0, '
        b'"other_files": [{"name": "x", "size": 1, "sha256": "../x"}]}]}',
    ],
)
def test_a_damaged_pointer_loses_one_id_only(root: Path, text: bytes) -> None:
    registry = Registry(root)
    store(registry, "a", ONE)
    store(registry, "b", TWO)
    (root / "ids" / "a.json").write_bytes(text)
    registry = reopen(registry, root)
    assert registry.recovery.damaged == ("a.json",)
    with pytest.raises(DataLossError, match="'a'"):
        registry.resolve("a")
    assert [record.id for record in registry.list()] == ["b"]
    registry.delete("b")
    assert sha256(BLOB) in blob_names(root)  # the pointer may have meant anything
    store(registry, "a", TWO)
    assert contents(registry, "a") == TWO


def test_a_damaged_manifest_loses_its_digest_only(root: Path) -> None:
    registry = Registry(root)
    digest = store(registry, "a", ONE).digest
    newer = store(registry, "a", TWO)
    path = root / "manifests" / f"{digest.removeprefix('sha256:')}.json"
    path.write_bytes(path.read_bytes().replace(b'"size": 300', b'"size": 301'))
    registry = reopen(registry, root)
    assert registry.recovery.damaged == (path.name,)
    assert registry.resolve("a") == newer
    with pytest.raises(DataLossError, match="'a'"):
        registry.resolve(f"a@{digest}")
    assert sha256(BLOB) in blob_names(root)
    registry.delete("a")
    assert os.listdir(root / "manifests") == []
    assert blob_names(root) == set()


def test_one_process_owns_a_store(registry: Registry, root: Path) -> None:
    with pytest.raises(FailedPreconditionError) as refusal:
        Registry(root)
    assert refusal.value.reason is Reason.STORE_IN_USE
    assert str(root) in str(refusal.value)


def test_another_format_is_refused(root: Path) -> None:
    Registry(root).close()
    (root / "FORMAT").write_text("lorastack-store 2\n")
    with pytest.raises(FailedPreconditionError) as refusal:
        Registry(root)
    assert refusal.value.reason is Reason.STORE_FORMAT


class Killed(BaseException):
    """The process dies here."""


def fail_at(patch: pytest.MonkeyPatch, step: int, error: BaseException, *, lasting: bool) -> None:
    """Raises at the file operation of that number; if lasting, at every later one too."""
    done = [0]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            done[0] += 1
            if done[0] - 1 == step or (lasting and done[0] > step):
                raise error
            return call(*args, **kwargs)

        return wrapper

    for name in ("replace", "unlink"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(os, "unlink", counted(os.unlink))
    patch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def run_until_killed(steps: int, call: Any) -> bool:
    """True if the call came to its end."""
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, steps, Killed(), lasting=True)
        try:
            call()
        except Killed:
            return False
        return True


@pytest.mark.parametrize("what", ["new", "replace", "delete"])
def test_a_crash_anywhere_leaves_all_or_nothing(tmp_path: Path, what: str) -> None:
    for steps in range(100):
        root = tmp_path / str(steps)
        registry = Registry(root)
        store(registry, "other", {"x.json": b"x", **TWO})
        before = None
        if what != "new":
            before = store(registry, "a", TWO).digest
        call = {
            "new": lambda r=registry: store(r, "a", ONE),
            "replace": lambda r=registry: store(r, "a", ONE),
            "delete": lambda r=registry: r.delete("a"),
        }[what]
        done = run_until_killed(steps, call)
        registry = reopen(registry, root)
        after = None if what == "delete" else adapter_digest(specs_of(ONE))
        found = {record.id: record.digest for record in registry.list()}
        assert found.pop("other")
        assert found.get("a") in ({after} if done else {before, after})
        for record in registry.list():
            registry.verify(record.digest)
        assert registry.recovery.damaged == ()
        if done:
            assert staged(root) == []
            assert steps > 3
            break
        # Whatever it left does not stand in the way.
        store(registry, "a", ONE)
        registry.verify(registry.resolve("a").digest)
        expected = {"other", "a"}
        assert {record.id for record in registry.list()} == expected
        assert staged(root) == []
    else:
        pytest.fail("never came to its end")


@pytest.mark.parametrize("what", ["new", "readme", "delete", "rollback", "default"])
def test_after_a_failed_write_memory_says_what_the_disk_says(tmp_path: Path, what: str) -> None:
    """One file operation fails and the process lives on: nothing that is listed loses a byte."""
    for step in range(100):
        root = tmp_path / str(step)
        registry = Registry(root)
        first = store(registry, "a", ONE).digest
        store(registry, "a", TWO)
        call = {
            "new": lambda r=registry: store(r, "b", {"x.json": b"x"}),
            "readme": lambda r=registry: store(r, "a", TWO | {"README.md": b"?"}),
            "delete": lambda r=registry: r.delete("a"),
            "rollback": lambda r=registry, digest=first: r.rollback("a", digest),
            "default": lambda r=registry: r.set_default_medusa("a"),
        }[what]
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, OSError(errno.EIO, "Input/output error"), lasting=False)
            try:
                call()
            except OSError:
                failed = True
        if what != "delete":
            store(registry, "c", {"y.json": b"y"})
            registry.delete("c")  # collects what memory does not know of
        before = (registry.list(), registry.default_medusa())
        registry = reopen(registry, root)
        assert (registry.list(), registry.default_medusa()) == before
        assert check_store(root, lambda done, total: None).damaged == ()
        registry.close()
        if not failed:
            assert step > 1
            break
    else:
        pytest.fail("never came to its end")


def test_recovery_reports_and_clears(root: Path) -> None:
    registry = Registry(root)
    store(registry, "a", ONE)
    upload = registry.begin_upload("b", specs_of(TWO))
    upload.write(specs_of(TWO)[1].sha256, 0, b"2")
    kept = upload.staging.path("").name
    expired = root / "staging" / "0"
    expired.mkdir()
    os.utime(expired, (0, 0))
    (root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"orphan")
    (root / "manifests" / f"{'0' * 64}.json").write_bytes(b"half")
    for folder in (root, root / "ids", root / "manifests"):
        (folder / f"x{durable.TEMPORARY}").write_bytes(b"half")
    registry = reopen(registry, root)
    assert registry.recovery == Recovery(
        expired_uploads=1,
        kept_uploads=1,
        removed_manifests=1,
        removed_blobs=1,
        damaged=(f"{'0' * 64}.json",),
    )
    assert "removed 1 blobs and 1 manifests" in str(registry.recovery)
    assert staged(root) == [kept]
    assert not any(path.suffix == durable.TEMPORARY for path in root.rglob("*"))
    assert contents(registry, "a") == ONE


@given(st.binary(max_size=80), st.integers(0, 500), st.sampled_from(["ids", "manifests"]))
@settings(max_examples=40, deadline=None)
def test_mangled_small_files_never_stop_a_start(data: bytes, cut: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        registry = Registry(root)
        digest = store(registry, "a", ONE).digest
        other = store(registry, "b", TWO)
        path = root / kind / ("a.json" if kind == "ids" else f"{digest[7:]}.json")
        text = path.read_bytes()
        path.write_bytes(text[:cut] + data + text[cut + len(data) :])
        registry = reopen(registry, root)
        assert registry.resolve("b") == other
        assert other in registry.list()
        check_store(root, lambda done, total: None)
        store(registry, "a", ONE)
        assert contents(registry, "a") == ONE
        registry.close()
