"""Checks every byte of a store. Reads only; a server may use the store meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorastack.adapters.store.durable import hash_file
from lorastack.adapters.store.ids import file_name
from lorastack.adapters.store.opening import TableFiles, check_format
from lorastack.adapters.store.tables import Tables, manifest_name

_BLOBS = Path("blobs", "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A file of an id's revision."""

    id: str
    digest: str
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """path: below the store's folder. used_by: what cannot be served because of it."""

    path: str
    problem: str
    used_by: tuple[Use, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedUpload:
    """What an upload that is running or waits to be resumed has on the disk."""

    key: str
    size_bytes: int


NUM_LOOKS = 5  # times that damaged-looking tables are read again


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a store holds and what is wrong with it."""

    num_adapters: int
    num_revisions: int
    num_blobs: int
    size_bytes: int
    damaged: tuple[Damage, ...]
    # Paths that no adapter needs: left by a deleted adapter or an unfinished upload. A start
    # removes them; a running server may be about to use them.
    orphans: tuple[str, ...]
    staged: tuple[StagedUpload, ...]


def check_store(root: Path, progress: Callable[[int, int], None]) -> Report:
    """Reads the whole store. progress: called with bytes read and bytes in all.

    Raises FailedPreconditionError if it is no store of this version.
    """
    check_format(root)
    files = TableFiles(root)
    blobs = files.read().blobs
    suspects, done, total = [], 0, sum(blobs.values())
    for sha256, size in sorted(blobs.items()):
        if _problem(root / _BLOBS / sha256, sha256, size):
            suspects.append(sha256)
        done += size
        progress(done, total)
    stored = _stored_files(root)
    # A live store changed meanwhile: what counts is what it says now.
    tables = files.read()
    for _ in range(NUM_LOOKS):  # a delete between two of its reads looks like damage; damage stays
        if not any(_damaged_tables(tables)):
            break
        tables = files.read()
    damage = [*_damaged_blobs(root, tables, suspects), *_damaged_tables(tables)]
    return Report(
        num_adapters=len(tables.pointers),
        num_revisions=sum(len(pointer.revisions) for pointer in tables.pointers.values()),
        num_blobs=len(tables.blobs),
        size_bytes=sum(tables.blobs.values()),
        damaged=tuple(sorted(damage, key=lambda item: item.path)),
        orphans=tuple(sorted(stored - _needed_files(tables))),
        staged=tuple(_staged(root / "staging")),
    )


def _problem(path: Path, sha256: str, size: int) -> str:
    """What is wrong with a blob; "" if nothing is."""
    try:
        if (actual := path.stat().st_size) != size:
            return f"{actual} bytes instead of {size}"
        return "" if hash_file(path) == sha256 else "the bytes do not have this sha256"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _damaged_blobs(root: Path, tables: Tables, suspects: list[str]) -> Iterator[Damage]:
    """The suspects that are still needed and still wrong."""
    problems = {
        sha256: problem
        for sha256 in suspects
        if sha256 in tables.blobs
        and (problem := _problem(root / _BLOBS / sha256, sha256, tables.blobs[sha256]))
    }
    users: dict[str, set[Use]] = {sha256: set() for sha256 in problems}
    for pointer in tables.pointers.values() if problems else ():
        for revision in pointer.revisions:
            for spec in tables.files(revision):
                if spec.sha256 in users:
                    use = Use(id=pointer.id, digest=revision.digest, file=spec.name)
                    users[spec.sha256].add(use)
    for sha256, problem in problems.items():
        used_by = tuple(sorted(users[sha256], key=lambda use: (use.id, use.digest, use.file)))
        yield Damage(path=str(_BLOBS / sha256), problem=problem, used_by=used_by)


def _damaged_tables(tables: Tables) -> Iterator[Damage]:
    """Pointers that cannot be read, and manifests in use that cannot or are missing."""
    for name in tables.damaged_pointers:
        yield Damage(path=f"ids/{name}", problem="cannot be read", used_by=())
    users: dict[str, list[Use]] = {}
    for pointer in tables.pointers.values():
        for digest in {revision.digest for revision in pointer.revisions} - tables.manifests.keys():
            use = Use(id=pointer.id, digest=digest, file="")
            users.setdefault(manifest_name(digest), []).append(use)
    for name, uses in users.items():
        problem = "cannot be read" if name in tables.damaged_manifests else "missing"
        yield Damage(path=f"manifests/{name}", problem=problem, used_by=tuple(uses))


def _stored_files(root: Path) -> set[str]:
    folders = (_BLOBS, Path("manifests"), Path("ids"))
    return {str(folder / name) for folder in folders for name in os.listdir(root / folder)}


def _needed_files(tables: Tables) -> set[str]:
    pointers = {file_name(adapter_id) for adapter_id in tables.pointers} | tables.damaged_pointers
    return {
        *(str(_BLOBS / sha256) for sha256 in tables.blobs),
        *(f"manifests/{manifest_name(digest)}" for digest in tables.digests),
        *(f"ids/{name}" for name in pointers),
    }


def _staged(folder: Path) -> Iterator[StagedUpload]:
    for upload in sorted(folder.iterdir()):
        with suppress(FileNotFoundError, NotADirectoryError):  # it ended meanwhile, or is no upload
            size = sum(path.stat().st_size for path in upload.iterdir())
            yield StagedUpload(key=upload.name, size_bytes=size)
