"""The store against a dictionary: any sequence of uploads, rollbacks, deletions and restarts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lorastack.adapters.store.fsck import check_store
from lorastack.adapters.store.manifest import adapter_digest
from lorastack.adapters.store.registry import Registry, Upload
from lorastack.errors import AbortedError, NotFoundError
from tests.adapters.folders import accept, contents, send, sha256, specs_of, staged, store

Contents = dict[str, bytes]
IDS = st.sampled_from(["a", "b", "ns/a"])
CONTENTS = st.sampled_from(
    [
        {"x.json": config, "w.safetensors": weights, **others}
        for config in (b"{}", b"[]")
        for weights in (b"1" * 9, b"2" * 9)
        for others in ({}, {"README.md": b"#"})
    ]
)


def digest_of(data: Contents) -> str:
    return adapter_digest(specs_of(data))


def kept(revisions: list[Contents], keep: int) -> list[Contents]:
    """Which of an id's revisions stay: repeated contents go first, then the oldest."""
    left = list(enumerate(revisions))
    for again in (True, False):
        for index, data in list(left)[:-1]:
            later = {digest_of(other) for at, other in left if at > index}
            if len(left) > keep and (not again or digest_of(data) in later):
                left.remove((index, data))
    return [data for _, data in left]


class Store(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.registry = Registry(self.root)
        self.reader = Registry(self.root, read_only=True)
        self.model: dict[str, list[Contents]] = {}  # id -> revisions
        self.open_uploads: list[tuple[str, Contents, Upload]] = []
        self.suspended: list[tuple[str, Contents, dict[str, int]]] = []  # bytes by sha256

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.registry.close()
            shutil.rmtree(self.root)

    def _stored(self, adapter_id: str, data: Contents) -> None:
        revisions = self.model.setdefault(adapter_id, [])
        if revisions and digest_of(revisions[-1]) == digest_of(data):
            del revisions[-1]  # the same revision, with other files perhaps
        revisions.append(data)

    def _take_over(self, adapter_id: str, data: Contents) -> None:
        """What a new upload does to unfinished ones of the same files under the same id."""
        for name, files, older in self.open_uploads:
            if (name, files) == (adapter_id, data):
                with pytest.raises(AbortedError):
                    older.write(sha256(data["x.json"]), 0, b"")
                older.abort()
        self.open_uploads = [u for u in self.open_uploads if u[:2] != (adapter_id, data)]
        self.suspended = [s for s in self.suspended if s[:2] != (adapter_id, data)]

    @rule(adapter_id=IDS, data=CONTENTS)
    def upload(self, adapter_id: str, data: Contents) -> None:
        store(self.registry, adapter_id, data)
        self._take_over(adapter_id, data)
        self._stored(adapter_id, data)

    @rule(adapter_id=IDS, data=CONTENTS, size=st.integers(0, 9))
    def begin(self, adapter_id: str, data: Contents, size: int) -> None:
        planned = dict(self.registry.plan_upload(adapter_id, specs_of(data)))
        upload = self.registry.begin_upload(adapter_id, specs_of(data))
        assert {spec.sha256 for spec in planned} == upload.needed
        for name, files, sizes in self.suspended:
            if (name, files) == (adapter_id, data):
                assert all(upload.staged[s] == sizes[s] for s in upload.needed & sizes.keys())
        self._take_over(adapter_id, data)
        weights = data["w.safetensors"]
        start = upload.staged.get(sha256(weights), 0)
        upload.write(sha256(weights), start, weights[start:size])
        self.open_uploads.append((adapter_id, data, upload))

    @rule(how=st.sampled_from([Upload.suspend, Upload.abort, Upload.commit]))
    def end(self, how: object) -> None:
        if not self.open_uploads:
            return
        adapter_id, data, upload = self.open_uploads.pop(0)
        if how is Upload.commit:
            send(upload, list(data.values()), chunk=4)
            upload.commit(accept, base_fingerprint="base")
            self._stored(adapter_id, data)
        elif how is Upload.suspend:
            upload.suspend()
            self.suspended.append((adapter_id, data, dict(upload.staged)))
        else:
            upload.abort()

    @rule(adapter_id=IDS, data=CONTENTS)
    def rollback(self, adapter_id: str, data: Contents) -> None:
        digest = digest_of(data)
        known = {digest_of(older): older for older in self.model.get(adapter_id, [])}
        if digest in known:
            self.registry.rollback(adapter_id, digest)
            self._stored(adapter_id, known[digest])
        else:
            with pytest.raises(NotFoundError):
                self.registry.rollback(adapter_id, digest)

    @rule(keep=st.integers(1, 3), adapter_id=st.sampled_from(["", "a", "b"]))
    def prune(self, keep: int, adapter_id: str) -> None:
        if adapter_id and adapter_id not in self.model:
            with pytest.raises(NotFoundError):
                self.registry.prune(keep, adapter_id)
            return
        before = self.registry.stored_bytes()
        pruned = self.registry.prune(keep, adapter_id)
        for name in [adapter_id] if adapter_id else self.model:
            self.model[name] = kept(self.model[name], keep)
        if not self.open_uploads:
            assert pruned.num_bytes >= before - self.registry.stored_bytes()

    @rule(adapter_id=IDS)
    def delete(self, adapter_id: str) -> None:
        if adapter_id in self.model:
            self.registry.delete(adapter_id)
            del self.model[adapter_id]
        else:
            with pytest.raises(NotFoundError):
                self.registry.delete(adapter_id)

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.suspended += [(name, data, dict(u.staged)) for name, data, u in self.open_uploads]
        self.open_uploads.clear()
        self.registry = Registry(self.root)
        assert self.registry.recovery.damaged == ()
        assert self.registry.recovery.kept_uploads == len(staged(self.root))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "registry"):
            return
        self.reader.refresh()
        assert self.reader._contents.tables == self.registry._contents.tables
        found = {record.id: record for record in self.registry.list()}
        assert found.keys() == self.model.keys()
        for adapter_id, revisions in self.model.items():
            digests = [digest_of(data) for data in revisions]
            known = self.registry.revisions(adapter_id)
            assert [record.digest for record in reversed(known)] == digests
            for digest, data in dict(zip(digests, revisions, strict=True)).items():
                assert contents(self.registry, f"{adapter_id}@{digest}") == data
        report = check_store(self.root, lambda done, total: None)
        assert report.damaged == ()
        # Those without a byte leave nothing on the disk.
        assert len(staged(self.root)) <= len(self.open_uploads) + len(self.suspended)
        on_disk = sum(path.stat().st_size for path in (self.root / "staging").glob("*/*"))
        assert self.registry.staging_bytes() == on_disk
        assert self.registry.stored_bytes() == report.size_bytes
        if not self.open_uploads:
            assert all(path.startswith("blobs") for path in report.orphans)


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
