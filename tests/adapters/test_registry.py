"""The store: uploads, look-ups, restarts, damage, and crashes at every step."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters import durable
from lorastack.adapters.formats import ParsedAdapter
from lorastack.adapters.manifest import FileSpec, adapter_digest
from lorastack.adapters.registry import Registry
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from tests.adapters.folders import accept, send, sha256, specs_of, store

ONE = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"one" * 100}
TWO = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"two" * 200}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    registry = Registry(root)
    yield registry
    registry.close()


def reopen(registry: Registry, root: Path) -> Registry:
    registry.close()
    return Registry(root)


def contents(registry: Registry, reference: str) -> dict[str, bytes]:
    files = registry.files(registry.resolve(reference).digest)
    return {name: path.read_bytes() for name, path in files.items()}


def blob_names(root: Path) -> set[str]:
    return set(os.listdir(root / "blobs" / "sha256"))


# -- uploads and look-ups -------------------------------------------------------------------------


def test_upload_and_read_back(registry: Registry, root: Path) -> None:
    record = store(registry, "team/a", ONE)
    assert (record.id, record.revision, record.digest) == (
        "team/a",
        1,
        adapter_digest(specs_of(ONE)),
    )
    assert registry.resolve("team/a") == record
    assert contents(registry, "team/a") == ONE
    assert record.manifest.size_bytes == 302
    assert record.manifest.base_fingerprint == "base"
    registry.verify(record.digest)
    assert os.listdir(root / "staging") == []


def test_a_second_upload_is_a_new_revision(registry: Registry, root: Path) -> None:
    first = store(registry, "a", ONE)
    second = store(registry, "a", TWO)
    assert (first.revision, second.revision) == (1, 2)
    assert contents(registry, "a") == TWO
    assert contents(registry, f"a@{first.digest}") == ONE
    assert registry.resolve(f"a@{first.digest}") == first
    registry = reopen(registry, root)
    assert registry.resolve("a") == second
    assert registry.resolve(f"a@{first.digest}") == first


def test_the_same_content_again_is_the_same_revision(registry: Registry) -> None:
    assert store(registry, "a", ONE) == store(registry, "a", ONE)


def test_equal_bytes_are_stored_and_sent_once(registry: Registry, root: Path) -> None:
    store(registry, "a", ONE)
    assert [spec.name for spec in registry.missing(specs_of(TWO))] == ["adapter_model.safetensors"]
    upload = registry.begin_upload("b", specs_of(TWO))
    assert upload.needed == {sha256(TWO["adapter_model.safetensors"])}
    upload.write(sha256(b"{}"), 0, b"{}")  # from a caller who planned it before it was stored
    send(upload, list(TWO.values()))
    upload.commit(accept, base_fingerprint="base")
    assert len(blob_names(root)) == 3


def test_list(registry: Registry) -> None:
    for name in ("b", "a/x", "a/b", "c"):
        store(registry, name, ONE)
    assert [record.id for record in registry.list()] == ["a/b", "a/x", "b", "c"]
    assert [record.id for record in registry.list("a/")] == ["a/b", "a/x"]
    assert registry.list("zzz") == []


def test_unknown_ids(registry: Registry) -> None:
    digest = store(registry, "a", ONE).digest
    other = "sha256:" + "0" * 64
    for reference in ("nobody", "", "a@", f"a@{other}", "a@rubbish", "../a", f"b@{digest}"):
        with pytest.raises(NotFoundError) as refusal:
            registry.resolve(reference)
        assert repr(reference) in str(refusal.value)
    for call in (registry.manifest, registry.files, registry.verify):
        with pytest.raises(NotFoundError, match=other):
            call(other)
    with pytest.raises(NotFoundError, match="nobody"):
        registry.delete("nobody")


def test_conditions(registry: Registry) -> None:
    digest = store(registry, "a", ONE, "").digest
    with pytest.raises(AlreadyExistsError, match="'a'"):
        registry.begin_upload("a", specs_of(ONE), "")
    for stale in ("sha256:" + "0" * 64, digest):
        with pytest.raises(AbortedError, match="'b'"):
            registry.begin_upload("b", specs_of(ONE), stale)
    with pytest.raises(InvalidArgumentError, match="if_digest"):
        registry.begin_upload("a", specs_of(ONE), "rubbish")
    assert store(registry, "a", TWO, digest).revision == 2
    with pytest.raises(AbortedError, match="'a'"):
        registry.begin_upload("a", specs_of(ONE), digest)


def test_of_two_uploads_of_a_new_id_one_wins(registry: Registry, root: Path) -> None:
    uploads = [registry.begin_upload("a", specs_of(data), "") for data in (ONE, TWO)]
    for upload, data in zip(uploads, (ONE, TWO), strict=True):
        send(upload, list(data.values()))
    uploads[1].commit(accept, base_fingerprint="base")
    with pytest.raises(AlreadyExistsError):
        uploads[0].commit(accept, base_fingerprint="base")
    assert contents(registry, "a") == TWO
    assert os.listdir(root / "staging") == []


def test_digest_covers_configs_and_weights_only() -> None:
    base = {**ONE, "README.md": b"1", "chat_template.jinja": b"t"}
    digest = adapter_digest(specs_of(base))
    assert adapter_digest(list(reversed(specs_of(base)))) == digest
    assert adapter_digest(specs_of(base | {"README.md": b"2", "notes.txt": b""})) == digest
    for name in ("chat_template.jinja", "adapter_config.json", "adapter_model.safetensors"):
        assert adapter_digest(specs_of(base | {name: b"other"})) != digest
    assert adapter_digest(specs_of({"x.json": b"a"})) != adapter_digest(specs_of({"y.json": b"a"}))


def test_a_new_readme_is_kept_under_the_same_digest(registry: Registry) -> None:
    first = store(registry, "a", ONE | {"README.md": b"1"})
    second = store(registry, "a", ONE | {"README.md": b"2"})
    assert (second.digest, second.revision) == (first.digest, 1)
    assert contents(registry, "a")["README.md"] == b"2"


# -- uploads that fail ----------------------------------------------------------------------------

BLOB = ONE["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("writes", "named"),
    [
        ([(0, BLOB[:-1])], "299 of 300 bytes"),
        ([(0, BLOB + b"x")], "longer than the announced 300"),
        ([(0, BLOB[:100]), (150, BLOB[150:])], "offset 150, but 100"),
        ([(0, BLOB[:100]), (0, BLOB[:100])], "offset 0, but 100"),
        ([(5, BLOB)], "offset 5, but 0"),
        ([(0, BLOB[:-1] + b"x")], "do not have sha256"),
        ([], "0 of 300 bytes"),
    ],
    ids=["short", "long", "gap", "again", "late", "other", "nothing"],
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
    assert os.listdir(root / "staging") == []


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
    assert os.listdir(root / "staging") == []


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
    for call in (registry.missing, lambda specs: registry.begin_upload("a", specs)):
        with pytest.raises(InvalidArgumentError, match=named):
            call(files)
    assert os.listdir(root / "staging") == []


def test_empty_files_need_no_chunks(registry: Registry) -> None:
    empty = ONE | {"empty.txt": b""}
    assert store(registry, "a", empty).manifest.size_bytes == 302
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
    assert os.listdir(root / "staging") == []
    store(registry, "a", ONE)


# -- deletion -------------------------------------------------------------------------------------


def test_delete_frees_what_nothing_else_needs(registry: Registry, root: Path) -> None:
    store(registry, "a", ONE)
    store(registry, "a", TWO)
    store(registry, "b", TWO)
    registry.delete("a")
    with pytest.raises(NotFoundError):
        registry.resolve("a")
    assert contents(registry, "b") == TWO
    assert blob_names(root) == {sha256(data) for data in TWO.values()}
    registry = reopen(registry, root)
    assert [record.id for record in registry.list()] == ["b"]
    registry.delete("b")
    assert blob_names(root) == set()
    assert os.listdir(root / "manifests") == []
    assert store(registry, "a", ONE).revision == 1


def test_running_rows_keep_a_deleted_digest(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    registry.delete("a", in_use={digest})
    registry.verify(digest)
    with pytest.raises(NotFoundError):
        registry.resolve("a")
    registry = reopen(registry, root)
    assert registry.recovery.removed_manifests == 1
    assert blob_names(root) == set()


def test_a_delete_does_not_take_the_bytes_of_a_running_upload(registry: Registry) -> None:
    store(registry, "a", ONE)
    upload = registry.begin_upload("b", specs_of(TWO))
    registry.delete("a")
    send(upload, list(TWO.values()))
    upload.commit(accept, base_fingerprint="base")
    assert contents(registry, "b") == TWO


# -- damage ---------------------------------------------------------------------------------------


def test_a_damaged_blob_is_named(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    other = store(registry, "b", TWO).digest
    path = registry.files(digest)["adapter_model.safetensors"]
    path.write_bytes(path.read_bytes().replace(b"o", b"0", 1))
    with pytest.raises(DataLossError, match=path.name):
        registry.verify(digest)
    registry.verify(other)
    # An upload that counts on the stored bytes is not built on sand.
    upload = registry.begin_upload("c", specs_of(ONE))
    with pytest.raises(DataLossError, match=path.name):
        upload.commit(accept, base_fingerprint="base")
    path.unlink()
    with pytest.raises(DataLossError, match=path.name):
        registry.verify(digest)
    registry.delete("a")
    store(registry, "a", ONE)
    registry.verify(digest)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b'{"id": "b", "revisions": []}'])
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


# -- crashes --------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process dies here."""


def kill_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Lets `steps` file operations happen; every later one, clean-up too, dies."""
    left = [steps]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*args, **kwargs)

        return wrapper

    for name in ("replace", "unlink"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(os, "unlink", counted(os.unlink))
    patch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def run_until_killed(registry: Registry, steps: int, call: Any) -> bool:
    """True if the call came to its end."""
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, steps)
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
        done = run_until_killed(registry, steps, call)
        registry = reopen(registry, root)
        after = None if what == "delete" else adapter_digest(specs_of(ONE))
        found = {record.id: record.digest for record in registry.list()}
        assert found.pop("other")
        assert found.get("a") in ({after} if done else {before, after})
        for record in registry.list():
            registry.verify(record.digest)
        assert registry.recovery.damaged == ()
        assert os.listdir(root / "staging") == []
        if done:
            assert steps > 3
            break
        # Whatever it left does not stand in the way.
        store(registry, "a", ONE)
        registry.verify(registry.resolve("a").digest)
        expected = {"other", "a"}
        assert {record.id for record in registry.list()} == expected
    else:
        pytest.fail("never came to its end")


def test_recovery_reports_and_clears(root: Path) -> None:
    registry = Registry(root)
    store(registry, "a", ONE)
    registry.begin_upload("b", specs_of(TWO))
    (root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"orphan")
    (root / "manifests" / f"x{durable.TEMPORARY}").write_bytes(b"half")
    (root / "ids" / f"y{durable.TEMPORARY}").write_bytes(b"half")
    registry = reopen(registry, root)
    assert registry.recovery.removed_uploads == 1
    assert registry.recovery.removed_blobs == 1
    assert registry.recovery.damaged == ()
    assert not any(path.suffix == durable.TEMPORARY for path in root.rglob("*"))
    assert contents(registry, "a") == ONE


# -- threads --------------------------------------------------------------------------------------


def test_many_threads(registry: Registry) -> None:
    """Uploads, look-ups and deletions of the same ids at once: whole adapters or NotFound."""
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(12):
                name = f"id-{(seed + turn) % 3}"
                data = {"adapter_config.json": b"{}", "w.safetensors": bytes([seed % 2]) * 50}
                store(registry, name, data)
                try:
                    record = registry.resolve(name)
                    registry.verify(record.digest)
                    if turn % 4 == 0:
                        registry.delete(name)
                except NotFoundError:
                    pass
                registry.list()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
