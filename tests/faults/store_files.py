"""A store's files, read without the code under test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def assert_whole(root: Path) -> None:
    """Every revision of every id has its manifest, and every file its true bytes.

    For stores that no process has open, also right after a kill: replacements that never happened
    (*.tmp), staged bytes and orphans may lie around.
    """
    for pointer in (root / "ids").glob("*.json"):
        for revision in json.loads(pointer.read_bytes())["revisions"]:
            name = revision["digest"].removeprefix("sha256:")
            manifest = json.loads((root / "manifests" / f"{name}.json").read_bytes())
            for file in manifest["files"]:
                data = (root / "blobs" / "sha256" / file["sha256"]).read_bytes()
                assert len(data) == file["size"], (pointer.name, file)
                assert hashlib.sha256(data).hexdigest() == file["sha256"], (pointer.name, file)
