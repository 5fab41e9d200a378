"""Changes of a store that faults interrupt, and the store they start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorastack.adapters.store.manifest import FileSpec
from lorastack.adapters.store.registry import Registry
from tests.adapters.folders import VALIDATE, sha256, store

ONE = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1" * 3000}
TWO = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"2" * 3000}
ALIAS = {"alias.json": b'{"loras": [{"lora_id": "old", "scale": 0.5}]}'}
ORPHAN = b"of an upload that was never published"


def upload(registry: Registry) -> None:
    store(registry, "new", TWO)


def replace(registry: Registry) -> None:
    store(registry, "old", TWO)


def repeat(registry: Registry) -> None:
    store(registry, "old", ONE)


def describe(registry: Registry) -> None:
    """The same digest, and a file that is not part of it; "twice" has the digest too."""
    store(registry, "old", ONE | {"README.md": b"new"})


def name_alias(registry: Registry) -> None:
    store(registry, "alias", ALIAS, validate=VALIDATE)


def roll_back(registry: Registry) -> None:
    registry.rollback("twice", registry.revisions("twice")[-1].digest)


def choose_heads(registry: Registry) -> None:
    registry.set_default_medusa("other")


def delete(registry: Registry) -> None:
    registry.delete("old")


def nothing(registry: Registry) -> None:
    """Opening the store, which recovers it, is what is interrupted."""


OPERATIONS: dict[str, Callable[[Registry], None]] = {
    operation.__name__: operation
    for operation in (
        *(upload, replace, repeat, describe, name_alias),
        *(roll_back, choose_heads, delete, nothing),
    )
}


def make_store(root: Path) -> Path:
    """Three ids, and what an earlier kill left behind."""
    registry = Registry(root)
    store(registry, "old", ONE)
    store(registry, "other", ONE | {"config.json": b"other"})
    store(registry, "twice", ONE | {"README.md": b"of twice"})
    store(registry, "twice", TWO | {"config.json": b"second"})
    registry.close()
    (root / "blobs" / "sha256" / sha256(ORPHAN)).write_bytes(ORPHAN)
    (root / "ids" / "half.json.tmp").write_bytes(b'{"id"')
    return root


# id -> files of its revisions; the default heads
State = tuple[dict[str, list[tuple[FileSpec, ...]]], str]


def state_of(registry: Registry) -> State:
    """What it lists, every byte of it verified."""
    found: dict[str, list[tuple[FileSpec, ...]]] = {}
    for record in registry.list():
        found[record.id] = [revision.files for revision in registry.revisions(record.id)]
        for revision in registry.revisions(record.id):
            for spec in revision.files:
                registry.verify_file(spec, revision.digest)
    return found, registry.default_medusa()


def state_on_disk(root: Path) -> State:
    """The same of a store that nobody has open."""
    registry = Registry(root)
    try:
        assert registry.recovery.damaged == ()
        return state_of(registry)
    finally:
        registry.close()
