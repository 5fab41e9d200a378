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
    for name in _manifests(root):
        for file in _files(root, name):
            data = (root / "blobs" / "sha256" / file["sha256"]).read_bytes()
            assert len(data) == file["size"], file
            assert hashlib.sha256(data).hexdigest() == file["sha256"], file


def assert_tidy(root: Path) -> None:
    """Nothing lies around that no id needs."""
    manifests = _manifests(root)
    assert {path.name for path in (root / "manifests").iterdir()} == manifests
    blobs = {file["sha256"] for name in manifests for file in _files(root, name)}
    assert {path.name for path in (root / "blobs" / "sha256").iterdir()} == blobs
    assert list((root / "staging").iterdir()) == []


def _manifests(root: Path) -> set[str]:
    """File names of all revisions' manifests."""
    return {
        revision["digest"].removeprefix("sha256:") + ".json"
        for pointer in (root / "ids").glob("*.json")
        for revision in json.loads(pointer.read_bytes())["revisions"]
    }


def _files(root: Path, manifest: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / "manifests" / manifest).read_bytes())["files"]
    return found
