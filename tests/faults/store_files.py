"""A store's files, read without the code under test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def assert_whole(root: Path) -> None:
    """Every revision of every id has its manifest, and every file its true bytes.

    For stores that nobody changes, also right after a kill: replacements that never happened
    (*.tmp), staged bytes and orphans may lie around.
    """
    for revision in _revisions(root):
        for file in _files(root, revision):
            data = (root / "blobs" / "sha256" / file["sha256"]).read_bytes()
            assert len(data) == file["size"], file
            assert hashlib.sha256(data).hexdigest() == file["sha256"], file


def assert_tidy(root: Path) -> None:
    """Nothing lies around that no id needs."""
    revisions = _revisions(root)
    manifests = {_manifest(revision) for revision in revisions}
    assert {path.name for path in (root / "manifests").iterdir()} == manifests
    blobs = {file["sha256"] for revision in revisions for file in _files(root, revision)}
    assert {path.name for path in (root / "blobs" / "sha256").iterdir()} == blobs
    assert list((root / "staging").iterdir()) == []


def _revisions(root: Path) -> list[dict[str, Any]]:
    """Of all ids."""
    return [
        revision
        for pointer in (root / "ids").glob("*.json")
        for revision in json.loads(pointer.read_bytes())["revisions"]
    ]


def _manifest(revision: dict[str, Any]) -> str:
    """The name of its manifest's file."""
    digest: str = revision["digest"]
    return digest.removeprefix("sha256:") + ".json"


def _files(root: Path, revision: dict[str, Any]) -> list[dict[str, Any]]:
    manifest = json.loads((root / "manifests" / _manifest(revision)).read_bytes())
    found: list[dict[str, Any]] = manifest["files"] + revision["other_files"]
    return found
