"""What must be on the disk before what, and who imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorastack.adapters.store.registry import Registry
from tests.adapters.folders import store

CONTENTS = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"one"}


class Journal:
    """Names of the files and folders that were synced or put into place, in order."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

        def record(verb: str, path: Path) -> None:
            self.lines.append(f"{verb} {path.relative_to(root).parts[0]}/{_kind(path)}")

        def log_fsync(handle: int) -> None:
            record("sync", Path(os.readlink(f"/proc/self/fd/{handle}")))
            fsync(handle)

        def log_replace(path: Path, target: Path) -> Path:
            record("place", target)
            return replace(path, target)

        def log_unlink(path: Path, missing_ok: bool = False) -> None:
            record("remove", path)
            unlink(path, missing_ok)

        patch.setattr(os, "fsync", log_fsync)
        patch.setattr(Path, "replace", log_replace)
        patch.setattr(Path, "unlink", log_unlink)


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def test_everything_is_durable_before_the_pointer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path)
    with monkeypatch.context() as patch:
        journal = Journal(tmp_path, patch)
        store(registry, "a", CONTENTS)
        assert journal.lines == [
            *["sync staging/file"] * 2,
            *["place blobs/file"] * 2,
            "sync blobs/folder",
            *["sync manifests/file", "place manifests/file", "sync manifests/folder"],
            *["sync ids/file", "place ids/file", "sync ids/folder"],
        ]
    registry.close()


def test_a_deletion_is_durable_before_bytes_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path)
    store(registry, "a", CONTENTS)
    with monkeypatch.context() as patch:
        journal = Journal(tmp_path, patch)
        registry.delete("a")
        assert journal.lines == ["remove ids/file", "sync ids/folder", "remove manifests/file"]
    registry.close()


def test_formats_are_read_without_torch() -> None:
    program = "import sys, lorastack.adapters.formats.parse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
