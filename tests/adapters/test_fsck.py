"""fsck names what is damaged and who needs it, and calls nothing else damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lorastack.adapters.store.fsck import Report, StagedUpload, Use, check_store
from lorastack.adapters.store.registry import Registry
from lorastack.errors import FailedPreconditionError
from tests.adapters.folders import BLOB, ONE, TWO, sha256, specs_of, store

NAME = "adapter_model.safetensors"


def check(root: Path) -> Report:
    return check_store(root, lambda done, total: None)


def test_a_sound_store(registry: Registry, root: Path) -> None:
    store(registry, "a", ONE)
    store(registry, "a", TWO)
    store(registry, "ns/b", TWO)
    upload = registry.begin_upload("c", specs_of({"x.json": b"123"}))
    upload.write(sha256(b"123"), 0, b"12")
    steps: list[tuple[int, int]] = []
    report = check_store(root, lambda done, total: steps.append((done, total)))
    key = upload.staging.path("").name
    assert report == Report(
        num_adapters=2,
        num_revisions=3,
        num_blobs=3,
        size_bytes=2 + 300 + 600,
        damaged=(),
        orphans=(),
        staged=(StagedUpload(key=key, size_bytes=2),),
    )
    assert steps[-1] == (902, 902)
    assert steps == sorted(steps)


def test_a_stray_file_among_the_uploads_is_none(registry: Registry, root: Path) -> None:
    upload = registry.begin_upload("c", specs_of({"x.json": b"123"}))
    upload.write(sha256(b"123"), 0, b"12")
    for name in ("!", "~"):  # before and behind the upload
        (root / "staging" / name).write_bytes(b"stray")
    assert [staged.size_bytes for staged in check(root).staged] == [2]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.write_bytes(b"x" + BLOB[1:]), "do not have this sha256"),
        (lambda path: path.write_bytes(BLOB[:-1]), "299 bytes instead of 300"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: (path.unlink(), path.mkdir()), "instead of 300"),
    ],
    ids=["flipped", "cut", "gone", "folder"],
)
def test_a_damaged_blob(registry: Registry, root: Path, damage, problem: str) -> None:
    first = store(registry, "a", ONE).digest
    store(registry, "a", TWO)
    other = {"more.json": b"[]", "copy.safetensors": BLOB, "copy.txt": BLOB}
    second = store(registry, "b", other).digest
    store(registry, "c", TWO)
    damage(root / "blobs" / "sha256" / sha256(BLOB))
    (found,) = check(root).damaged
    assert found.path == f"blobs/sha256/{sha256(BLOB)}"
    assert problem in found.problem
    assert found.used_by == (
        Use(id="a", digest=first, file=NAME),
        Use(id="b", digest=second, file="copy.safetensors"),
        Use(id="b", digest=second, file="copy.txt"),
    )


def test_damaged_tables(registry: Registry, root: Path) -> None:
    one, two = store(registry, "a", ONE).digest, store(registry, "b", TWO).digest
    store(registry, "c", TWO)
    for digest, damage in ((one, Path.unlink), (two, lambda path: path.write_bytes(b"{}"))):
        damage(root / "manifests" / f"{digest.removeprefix('sha256:')}.json")
    (root / "ids" / "c.json").write_bytes(b"")
    found = {damage.path: damage for damage in check(root).damaged}
    assert {path: damage.problem for path, damage in found.items()} == {
        "ids/c.json": "cannot be read",
        f"manifests/{one.removeprefix('sha256:')}.json": "missing",
        f"manifests/{two.removeprefix('sha256:')}.json": "cannot be read",
    }
    assert found[f"manifests/{two[7:]}.json"].used_by == (Use(id="b", digest=two, file=""),)


def test_orphans_are_no_damage(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    registry.delete("a", in_use={digest})
    (root / "ids" / "x.json.tmp").write_bytes(b"half")
    report = check(root)
    assert report.damaged == ()
    assert report.orphans == (
        *sorted(f"blobs/sha256/{sha256(data)}" for data in ONE.values()),
        "ids/x.json.tmp",
        f"manifests/{digest.removeprefix('sha256:')}.json",
    )


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="FORMAT"):
        check(tmp_path)


def test_deleted_during_the_check_is_not_damage(registry: Registry, root: Path) -> None:
    store(registry, "a", ONE)
    store(registry, "b", TWO)

    def delete(done: int, total: int) -> None:
        if registry.list("a"):  # the first blob was read
            registry.delete("a")

    report = check_store(root, delete)
    assert report.damaged == ()
    assert report.num_adapters == 1


def test_a_live_store_is_not_called_damaged(registry: Registry, root: Path) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        try:
            turn = 0
            while not stop.is_set():
                turn += 1
                store(registry, f"id-{turn % 3}", {"x.json": b"{}", "w.safetensors": b"%d" % turn})
                if turn % 2:
                    registry.delete(f"id-{turn % 3}")
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(40):
            assert check(root).damaged == ()
    finally:
        stop.set()
        writer.join()
    assert errors == []
