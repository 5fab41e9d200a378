"""The store against a dictionary: any sequence of uploads, deletions and restarts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lorastack.adapters.manifest import adapter_digest
from lorastack.adapters.registry import Registry, Upload
from lorastack.errors import NotFoundError
from tests.adapters.folders import accept, send, sha256, specs_of, store

IDS = st.sampled_from(["a", "b", "ns/a"])
CONTENTS = st.sampled_from(
    [
        {"x.json": config, "w.safetensors": weights}
        for config in (b"{}", b"[]")
        for weights in (b"1" * 9, b"2" * 9)
    ]
)


class Store(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.registry = Registry(self.root)
        self.model: dict[str, list[dict[str, bytes]]] = {}  # id -> revisions
        self.open_uploads: list[tuple[str, dict[str, bytes], Upload]] = []

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.registry.close()
            shutil.rmtree(self.root)

    def _stored(self, adapter_id: str, contents: dict[str, bytes]) -> None:
        revisions = self.model.setdefault(adapter_id, [])
        if not revisions or revisions[-1] != contents:
            revisions.append(contents)

    @rule(adapter_id=IDS, contents=CONTENTS)
    def upload(self, adapter_id: str, contents: dict[str, bytes]) -> None:
        store(self.registry, adapter_id, contents)
        self._stored(adapter_id, contents)

    @rule(adapter_id=IDS, contents=CONTENTS)
    def begin(self, adapter_id: str, contents: dict[str, bytes]) -> None:
        upload = self.registry.begin_upload(adapter_id, specs_of(contents))
        self.open_uploads.append((adapter_id, contents, upload))

    @rule(commit=st.booleans())
    def end(self, commit: bool) -> None:
        if not self.open_uploads:
            return
        adapter_id, contents, upload = self.open_uploads.pop(0)
        send(upload, list(contents.values()), chunk=4)
        if commit:
            upload.commit(accept, base_fingerprint="base")
            self._stored(adapter_id, contents)
        else:
            upload.abort()

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
        self.open_uploads.clear()
        self.registry = Registry(self.root)
        assert self.registry.recovery.damaged == ()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "registry"):
            return
        found = {record.id: record for record in self.registry.list()}
        assert found.keys() == self.model.keys()
        for adapter_id, revisions in self.model.items():
            assert found[adapter_id].revision == len(revisions)
            for contents in revisions:
                digest = adapter_digest(specs_of(contents))
                record = self.registry.resolve(f"{adapter_id}@{digest}")
                self.registry.verify(record.digest)
                files = self.registry.files(record.digest)
                assert {name: path.read_bytes() for name, path in files.items()} == contents
        # At least what is needed is there; nothing else once no upload is open.
        blobs = {path.name for path in (self.root / "blobs" / "sha256").iterdir()}
        needed = {
            sha256(data)
            for revisions in self.model.values()
            for contents in revisions
            for data in contents.values()
        }
        assert needed <= blobs


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
