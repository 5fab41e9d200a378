"""Changes of a store that faults interrupt, and the store they start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorastack.adapters.registry import Registry
from tests.adapters.folders import sha256, store

ONE = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1" * 3000}
TWO = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"2" * 3000}
ORPHAN = b"of an upload that was never published"


def upload(registry: Registry) -> None:
    store(registry, "new", TWO)


def replace(registry: Registry) -> None:
    store(registry, "old", TWO)


def repeat(registry: Registry) -> None:
    store(registry, "old", ONE)


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
    for operation in (upload, replace, repeat, roll_back, choose_heads, delete, nothing)
}


def make_store(root: Path) -> Path:
    """Three ids, and what an earlier kill left behind."""
    registry = Registry(root)
    store(registry, "old", ONE)
    store(registry, "other", ONE | {"config.json": b"other"})
    store(registry, "twice", ONE)
    store(registry, "twice", TWO | {"config.json": b"second"})
    registry.close()
    (root / "blobs" / "sha256" / sha256(ORPHAN)).write_bytes(ORPHAN)
    (root / "ids" / "half.json.tmp").write_bytes(b'{"id"')
    return root


State = tuple[dict[str, list[str]], str]  # id -> digests of its revisions; the default heads


def state_of(registry: Registry) -> State:
    """What it lists, every byte of it verified."""
    found: dict[str, list[str]] = {}
    for record in registry.list():
        found[record.id] = [revision.digest for revision in registry.revisions(record.id)]
        for digest in found[record.id]:
            registry.verify(digest)
    return found, registry.default_medusa()


def state_on_disk(root: Path) -> State:
    """The same of a store that nobody has open."""
    registry = Registry(root)
    try:
        assert registry.recovery.damaged == ()
        return state_of(registry)
    finally:
        registry.close()
