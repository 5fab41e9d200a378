"""The store: look-ups, revisions, conditions, deletion, and many threads at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.store.manifest import Manifest, Pointer, Revision, adapter_digest
from lorastack.adapters.store.registry import Registry
from lorastack.adapters.store.tables import Tables
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
)
from tests.adapters.folders import (
    FACTS,
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

MANIFEST = Manifest(digest="d", files=(), facts=FACTS, base_fingerprint="")


def test_upload_and_read_back(registry: Registry, root: Path) -> None:
    record = store(registry, "team/a", ONE)
    assert (record.id, record.revision, record.digest) == (
        "team/a",
        1,
        adapter_digest(specs_of(ONE)),
    )
    assert registry.resolve("team/a") == record
    assert contents(registry, "team/a") == ONE
    assert record.size_bytes == 302
    assert record.manifest.base_fingerprint == "base"
    registry.verify(record.digest)
    assert staged(root) == []


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
    ((needed, offset),) = registry.plan_upload("b", specs_of(TWO))
    assert (needed.name, offset) == ("adapter_model.safetensors", 0)
    upload = registry.begin_upload("b", specs_of(TWO))
    assert upload.needed == {sha256(TWO["adapter_model.safetensors"])}
    with pytest.raises(InvalidArgumentError, match="not announced"):
        upload.write(sha256(b"[]"), 0, b"[]")
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


def test_revisions_and_rollback(registry: Registry, root: Path) -> None:
    first, second = store(registry, "a", ONE), store(registry, "a", TWO)
    assert registry.revisions("a") == [second, first]
    third = registry.rollback("a", first.digest)
    assert (third.revision, third.digest) == (3, first.digest)
    assert contents(registry, "a") == ONE
    assert registry.rollback("a", first.digest) == third  # asked twice
    registry = reopen(registry, root)
    assert registry.resolve("a") == third
    assert registry.revisions("a") == [third, second, first]
    # A name by digest is the newest of that content.
    assert registry.resolve(f"a@{first.digest}") == third
    other = store(registry, "b", {"x.json": b"x"}).digest
    with pytest.raises(NotFoundError, match=f"a@{other}"):
        registry.rollback("a", other)
    for call in (registry.revisions, lambda name: registry.rollback(name, other)):
        with pytest.raises(NotFoundError, match="nobody"):
            call("nobody")
    registry.close()


def test_default_medusa_is_kept(registry: Registry, root: Path) -> None:
    digest = store(registry, "a", ONE).digest
    assert registry.default_medusa() == ""
    with pytest.raises(NotFoundError, match="nobody"):
        registry.set_default_medusa("nobody")
    for reference in ("a", f"a@{digest}", ""):
        registry.set_default_medusa(reference)
        assert registry.default_medusa() == reference
        registry = reopen(registry, root)
        assert registry.default_medusa() == reference
    (root / "default_medusa.json").write_bytes(b"{")
    registry = reopen(registry, root)
    assert registry.default_medusa() == ""
    registry.close()


@given(
    names=st.sets(st.text("ab-./Z", min_size=1, max_size=4)), prefix=st.text("ab-./Z", max_size=3)
)
def test_list_by_prefix(names: set[str], prefix: str) -> None:
    pointers = {
        name: Pointer(id=name, revisions=(Revision(revision=1, digest="d", created_at=0.0),))
        for name in names
    }
    tables = Tables.of(
        pointers=pointers,
        manifests={"d": MANIFEST},
        damaged_pointers=frozenset(),
        damaged_manifests=frozenset(),
        default_medusa="",
    )
    expected = sorted(name for name in names if name.startswith(prefix))
    assert [record.id for record in tables.starting_with(prefix)] == expected


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
    with pytest.raises(NotFoundError, match="'nobody': `lorastack adapters list`"):
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
    assert staged(root) == []


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
    assert registry.list() == [second]
    # The old one is of no adapter now.
    ((spec, _),) = registry.plan_upload("b", specs_of(ONE | {"README.md": b"1"}))
    assert spec.name == "README.md"


def test_every_id_has_its_own_readme(registry: Registry, root: Path) -> None:
    """Also when another id or revision has the same digest, and after a restart."""
    mine, yours = ONE | {"README.md": b"mine"}, ONE | {"README.md": b"yours"}
    first = store(registry, "a", mine)
    assert store(registry, "b", yours).digest == first.digest
    store(registry, "bare", ONE)
    store(registry, "a", TWO | {"NOTES": b"n"})
    registry.delete("b")
    store(registry, "b", yours)
    reader = Registry(root, read_only=True)
    for found in (registry, reader, reopen(registry, root)):
        assert contents(found, "b") == yours
        assert contents(found, "bare") == ONE
        assert contents(found, f"a@{first.digest}") == mine
        assert contents(found, "a") == TWO | {"NOTES": b"n"}
        assert found.resolve("b").size_bytes == 302 + len(b"yours")
    registry = found
    registry.rollback("a", first.digest)
    assert contents(registry, "a") == mine
    registry.delete("b")
    assert blob_names(root) == {sha256(data) for data in (*mine.values(), *TWO.values(), b"n")}
    registry.close()
    reader.close()


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


def test_many_threads(registry: Registry) -> None:
    """Uploads, look-ups and deletions of the same ids at once: whole adapters or NotFound."""
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(12):
                name = f"id-{(seed + turn) % 3}"
                data = {"adapter_config.json": b"{}", "w.safetensors": bytes([seed % 2]) * 50}
                try:
                    store(registry, name, data)
                except AbortedError:  # another thread took the same upload over
                    continue
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
