"""What the store knows about adapters, and how it is written down.

    FORMAT                      "lorastack-store 1"
    LOCK                        held by the one process that writes; many may read
    blobs/sha256/<hex>          a file's bytes, named by their sha256; equal content is stored once
    manifests/<hex>.json        one per digest: its files, and what validation found out
    ids/<id>.json               the pointer: an id's revisions, newest last ('/' as '%2F'), with
                                their files that the digest does not cover
    default_medusa.json         the id of the default heads
    acceptance.json             what serving taught about heads (`learned`); may be lost
    staging/<key>/<hex>         bytes of uploads that are not finished; key: hash of id and files

Replacing the pointer is the only commit point: blobs and the manifest are durable before it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.store.durable import hash_file
from lorastack.errors import InvalidArgumentError

FORMAT = "lorastack-store 1\n"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_RUN = 1 << 16  # modules
_CONFIG_SUFFIXES = (".json", ".jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """One file of an adapter. sha256: lower-case hex."""

    name: str
    size: int
    sha256: str


def file_spec(path: Path) -> FileSpec:
    """What a file on disk would be stored as."""
    return FileSpec(name=path.name, size=path.stat().st_size, sha256=hash_file(path))


def in_digest(name: str) -> bool:
    """True for files that the digest covers: configs, templates and safetensors."""
    return name.endswith((*_CONFIG_SUFFIXES, ".safetensors"))


def adapter_digest(files: Iterable[FileSpec]) -> str:
    """The identity of an adapter: "sha256:" + hex over its config files and safetensors.

    The hash covers name, size and sha256 of each file, each ended by a NUL, sorted by name. Configs
    are all .json and .jinja files (a chat template changes answers); a README changes nothing.
    """
    digest = hashlib.sha256()
    for spec in sorted(files, key=lambda spec: spec.name):
        if in_digest(spec.name):
            digest.update(f"{spec.name}\0{spec.size}\0{spec.sha256}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def check_files(files: Sequence[FileSpec], *, max_files: int, max_bytes: int) -> None:
    """Raises InvalidArgumentError unless these can be the files of one adapter."""
    if not 0 < len(files) <= max_files:
        raise InvalidArgumentError(f"an adapter has 1 to {max_files} files, not {len(files)}")
    for spec in files:
        _check_file(spec)
    if len({spec.name for spec in files}) != len(files):
        raise InvalidArgumentError("two files have the same name")
    if len({spec.sha256 for spec in files}) != len({(spec.sha256, spec.size) for spec in files}):
        raise InvalidArgumentError("two files have the same sha256, but different sizes")
    if (total := sum(spec.size for spec in files)) > max_bytes:
        raise InvalidArgumentError(
            f"the adapter has {total} bytes; at most {max_bytes} are accepted"
        )


def _check_file(spec: FileSpec) -> None:
    if not _is_plain(spec.name):
        raise InvalidArgumentError(f"{spec.name[:80]!r} is not a plain file name")
    if spec.size < 0 or not _SHA256.fullmatch(spec.sha256):
        raise InvalidArgumentError(f"{spec.name} lacks a size or a lower-case hex sha256")


def _is_plain(name: str) -> bool:
    """A short printable name without folders."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= 200
        and name.isprintable()
        and not {"/", "\\"} & set(name)
        and name not in (".", "..")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An immutable adapter: its files, and what validation found out about it.

    A manifest's JSON has the facts beside the other fields.
    """

    digest: str
    files: tuple[FileSpec, ...]  # the ones that the digest covers
    facts: Facts
    base_fingerprint: str  # of the base model it was validated against
    # (scale, number of successive modules that have it), modules sorted by layer and target; empty
    # without a LoRA, and in manifests of older versions.
    scales: tuple[tuple[float, int], ...] = ()

    @property
    def module_scales(self) -> list[float] | None:
        """The scale of every module that has a LoRA, by layer and target; None if not known."""
        return [scale for scale, count in self.scales for _ in range(count)] or None

    def to_bytes(self) -> bytes:
        """As JSON, with a hash of all fields, as a load trusts the scales."""
        fields = asdict(self)
        del fields["facts"]
        fields |= self.facts.to_json()
        return _dump({**fields, "check": _check(fields)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError, KeyError or TypeError for a damaged file."""
        fields = json.loads(data)
        check = fields.pop("check", None)
        # Older versions wrote neither a check nor scales.
        if (check is not None or "scales" in fields) and check != _check(fields):
            raise ValueError("the manifest's check does not fit its other fields")
        manifest = cls(
            digest=fields.pop("digest"),
            files=tuple(FileSpec(**spec) for spec in fields.pop("files")),
            base_fingerprint=fields.pop("base_fingerprint"),
            scales=tuple(_run(run) for run in fields.pop("scales", ())),
            facts=Facts.from_json(fields),
        )
        if adapter_digest(manifest.files) != manifest.digest:
            raise ValueError("the manifest's files do not give its digest")
        return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One state of an id. created_at: seconds since the epoch.

    other_files: outside the digest, a README for one; another id with this digest has its own.
    """

    revision: int  # 1-based
    digest: str
    created_at: float
    other_files: tuple[FileSpec, ...] = ()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Revision:
        """From parsed JSON. Raises whatever damaged fields raise."""
        others = tuple(FileSpec(**spec) for spec in fields.pop("other_files", ()))
        for spec in others:
            _check_file(spec)
        return cls(**fields, other_files=others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """An id and its revisions, newest last. Never empty."""

    id: str
    revisions: tuple[Revision, ...]

    @property
    def newest(self) -> Revision:
        return self.revisions[-1]

    @classmethod
    def after(
        cls, old: Pointer | None, adapter_id: str, digest: str, other_files: tuple[FileSpec, ...]
    ) -> Pointer:
        """An id's pointer with a new newest revision. old: the pointer until now."""
        revision = Revision(
            revision=1, digest=digest, created_at=time.time(), other_files=other_files
        )
        if old is None:
            return cls(id=adapter_id, revisions=(revision,))
        return old.with_revision(revision)

    def with_revision(self, revision: Revision) -> Pointer:
        """A new newest revision; its number is set here.

        The same digest again is the same revision: a client that lost the answer may ask twice.
        """
        older, newest = self.revisions[:-1], self.newest
        if newest.digest == revision.digest:
            same = replace(newest, other_files=revision.other_files)
            return replace(self, revisions=(*older, same))
        revision = replace(revision, revision=newest.revision + 1)
        return replace(self, revisions=(*self.revisions, revision))

    def to_bytes(self) -> bytes:
        return _dump(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Pointer:
        """Raises whatever a damaged file's fields raise."""
        fields = json.loads(data)
        revisions = tuple(Revision.from_fields(revision) for revision in fields["revisions"])
        if not revisions:
            raise ValueError("the pointer has no revisions")
        return cls(id=fields["id"], revisions=revisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An id's revision together with its manifest: what callers of the registry see."""

    id: str
    revision: int
    created_at: float  # seconds since the epoch
    manifest: Manifest
    other_files: tuple[FileSpec, ...]

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def files(self) -> tuple[FileSpec, ...]:
        """All files that were uploaded."""
        return self.manifest.files + self.other_files

    @property
    def size_bytes(self) -> int:
        return sum(spec.size for spec in self.files)


def runs(scales: Iterable[float]) -> tuple[tuple[float, int], ...]:
    """Scales as a manifest has them. Most adapters have one scale for all modules."""
    return tuple((scale, len(list(same))) for scale, same in groupby(scales))


def _run(fields: Any) -> tuple[float, int]:
    """From parsed JSON. Raises ValueError or TypeError."""
    scale, count = fields
    if not isfinite(scale) or not 0 < count <= _MAX_RUN:
        raise ValueError("not a scale of so many modules")
    return float(scale), int(count)


def _check(fields: dict[str, object]) -> str:
    return hashlib.sha256(_dump(fields)).hexdigest()


def _dump(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n"
