"""Which revisions and bytes stay, and how earlier ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorastack.adapters.store.manifest import Pointer, Revision
from lorastack.adapters.store.registry import Pruned, Registry
from lorastack.adapters.store.tables import Tables
from lorastack.errors import InvalidArgumentError, NotFoundError
from tests.adapters.folders import BLOB, ONE, TWO, blob_names, contents, reopen, sha256, store


def test_rollback_by_the_first_digits(registry: Registry) -> None:
    first = store(registry, "a", ONE).digest
    store(registry, "a", TWO)
    digits = first.removeprefix("sha256:")
    for start in (digits[:7], "", "sha256:", "sha256:" + digits[:7], digits.upper(), digits + "0"):
        with pytest.raises(InvalidArgumentError, match="adapters revisions a"):
            registry.rollback("a", start)
    with pytest.raises(NotFoundError, match="adapters revisions a"):
        registry.rollback("a", "0" * 8)
    for revision, start in ((3, digits[:8]), (3, f"sha256:{digits[:9]}"), (3, first)):
        record = registry.rollback("a", start)
        assert (record.digest, record.revision) == (first, revision)


def test_a_start_that_fits_two_revisions_is_refused(registry: Registry) -> None:
    """Digests are made up: nobody finds two that begin alike."""
    record = store(registry, "a", ONE)
    twins = tuple(f"sha256:{'ab' * 4}{digit * 56}" for digit in "01")
    revisions = tuple(
        Revision(revision=at + 1, digest=twin, created_at=0.0) for at, twin in enumerate(twins)
    )
    manifests = {twin: replace(record.manifest, digest=twin) for twin in twins}
    tables = Tables.of(
        pointers={"a": Pointer(id="a", revisions=revisions)},
        manifests=manifests,
        damaged_pointers=frozenset(),
        damaged_manifests=frozenset(),
        default_medusa="",
    )
    with pytest.raises(InvalidArgumentError, match="fits 2 revisions"):
        tables.find("a", "ab" * 4)
    assert tables.find("a", "ab" * 4 + "1").digest == twins[1]


def test_old_revisions_are_pruned(registry: Registry, root: Path) -> None:
    contents_of = [{"x.json": b"{}", "x.safetensors": bytes([n]) * 100} for n in range(5)]
    digests = [store(registry, "a", data).digest for data in contents_of]
    store(registry, "b", contents_of[0])
    registry.set_default_medusa(f"a@{digests[1]}")
    assert registry.stored_bytes() == 502
    pruned = registry.prune(2, "a", in_use={digests[2]})
    # The first one's bytes are b's as well; the second is the default, the third in use.
    assert pruned == Pruned(num_revisions=1, num_bytes=0, digests=frozenset())
    assert [r.digest for r in registry.revisions("a")] == [*reversed(digests[1:])]
    registry.set_default_medusa("")
    pruned = registry.prune(2)
    assert pruned == Pruned(num_revisions=2, num_bytes=200, digests=frozenset(digests[1:3]))
    assert [r.revision for r in registry.revisions("a")] == [5, 4]
    assert registry.stored_bytes() == 302
    registry = reopen(registry, root)
    assert [r.revision for r in registry.revisions("a")] == [5, 4]
    assert contents(registry, "b") == contents_of[0]
    assert store(registry, "a", ONE).revision == 6  # numbers are not given again
    assert registry.prune(0, "a").num_revisions == 2  # the newest stays
    with pytest.raises(NotFoundError, match="nobody"):
        registry.prune(2, "nobody")
    with pytest.raises(NotFoundError, match="no adapter 'a@sha256"):
        registry.prune(2, f"a@{registry.resolve('a').digest}")
    registry.close()


def test_repeated_contents_are_pruned_first(registry: Registry) -> None:
    """Rolling back to and fro takes nothing from anybody."""
    first, second, third = (
        store(registry, "a", {"x.json": b"{}", "x.safetensors": bytes([n])}).digest
        for n in range(3)
    )
    for _ in range(20):
        registry.rollback("a", second)
        registry.rollback("a", third)
        registry.prune(3, "a")
    assert [r.digest for r in registry.revisions("a")] == [third, second, first]


def test_what_is_held_stays_on_the_disk(registry: Registry, root: Path) -> None:
    record = registry.hold(store(registry, "a", ONE).id)
    again = registry.hold("a")
    registry.delete("a")
    for _ in range(2):
        assert registry.path(record.files[1]).read_bytes() == BLOB
        with pytest.raises(NotFoundError):
            registry.hold("a")
        store(registry, "b", TWO)
        registry.delete("b")
    registry.release(again)
    assert sha256(BLOB) in blob_names(root)
    registry.release(record)
    assert blob_names(root) == set()
