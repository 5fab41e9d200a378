"""MergeAdapters: a LoRA of several, made once, stored as an upload is, kept while there is room."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.formats.merged import WEIGHTS_NAME, Merge, MergeSource
from lorastack.adapters.formats.merging import MajoritySign, MergeRule, Strategy
from lorastack.adapters.formats.parse import parse
from lorastack.adapters.formats.peft import CONFIG_NAME
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.threads import be_nice
from lorastack.adapters.sources.base import Pieces, SourceFile, copy_missing, describe, pieces_of
from lorastack.adapters.store.durable import disk_full_is_exhaustion
from lorastack.adapters.store.ids import MERGED
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.adapters.store.upload import Upload
from lorastack.config import AdapterConfig
from lorastack.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.layout import AdapterKind, ModelShapes
from lorastack.service.adapters.writer import StoreWriter
from lorastack.service.edge import limits
from lorastack.service.edge.places import Places
from lorastack.service.edge.threads import run_in
from lorastack.v1 import adapters_pb2

MERGES, MERGES_PER_CALLER = 64, 32  # that run or wait, at a time
_Request = adapters_pb2.MergeAdaptersRequest
_STRATEGIES = {
    _Request.TIES: Strategy.TIES,
    _Request.DARE_LINEAR: Strategy.DARE_LINEAR,
    _Request.DARE_TIES: Strategy.DARE_TIES,
}
_SIGNS = {
    _Request.MAJORITY_SIGN_UNSPECIFIED: MajoritySign.TOTAL,
    _Request.TOTAL: MajoritySign.TOTAL,
    _Request.FREQUENCY: MajoritySign.FREQUENCY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A merge as asked for. loras: with their weights, in the request's order."""

    loras: tuple[tuple[Record, float], ...]
    rule: MergeRule
    key: str  # sha256 of all that the result depends on, in hex

    @property
    def id(self) -> str:
        return f"{MERGED}{self.key[:16]}"


class Merges:
    """One thread of low priority computes, one merge at a time, so equal ones are computed once.

    uploader: the one thread that changes the store. readers: threads for look-ups.
    """

    def __init__(
        self,
        *,
        config: AdapterConfig,
        registry: Registry,
        writer: StoreWriter,
        catalogue: Catalogue,
        pool: DevicePool,
        shapes: ModelShapes,
        fingerprint: str,
        needed: Callable[[], Collection[str]],
        readers: Executor,
        uploader: Executor,
    ) -> None:
        """fingerprint: the base model's. needed: digests that requests or pins may load again."""
        self._config = config
        self._registry = registry
        self._writer = writer
        self._catalogue = catalogue
        self._pool = pool
        self._shapes = shapes
        self._fingerprint = fingerprint
        self._needed = needed
        self._readers = readers
        self._uploader = uploader
        self._asked_at: dict[str, float] = {}  # by id, seconds since the epoch
        self._closing = False
        self._places = Places(
            "merge", together=MERGES, per_caller=MERGES_PER_CALLER, idle=config.transfer_idle
        )
        self._merger = ThreadPoolExecutor(1, "lorastack-merge", initializer=be_nice)

    def close(self) -> None:
        """Ends the merge that runs and waits for it."""
        self._closing = True
        self._merger.shutdown(cancel_futures=True)

    async def merge(self, request: adapters_pb2.MergeAdaptersRequest, caller: str) -> Record:
        """The merged adapter, computed unless it is stored already.

        Raises InvalidArgumentError, NotFoundError, FailedPreconditionError, DataLossError, or
        ResourceExhaustedError when too many merges wait or every merged adapter is in use.
        """
        async with self._places.take(caller):
            wanted = await run_in(self._readers, self._wanted, request)
            if (record := self._stored(wanted)) is not None:
                return record
            return await run_in(self._merger, self._made, wanted, caller)

    def _wanted(self, request: adapters_pb2.MergeAdaptersRequest) -> _Wanted:
        rule = _rule(request)
        limits.check_num_loras(request.loras)
        named = [
            (ref.lora_id, _short(ref.scale) if ref.HasField("scale") else 1.0)
            for ref in request.loras
        ]
        limits.check(len(named) >= 2, "loras", "at least 2 LoRAs to merge", len(named))
        limits.check_loras(named)
        loras = tuple((self._lora(lora_id), weight) for lora_id, weight in named)
        digests = [record.digest for record, _ in loras]
        if len(set(digests)) < len(digests):
            raise InvalidArgumentError(
                "loras names the same adapter twice; name it once and add the scales",
                field="loras",
            )
        fields = {
            "base": self._fingerprint,
            "strategy": rule.strategy,
            "density": rule.density,
            "majority_sign": rule.majority_sign,
            "loras": [(record.digest, weight) for record, weight in loras],
        }
        key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return _Wanted(loras=loras, rule=rule, key=key)

    def _lora(self, lora_id: str) -> Record:
        record = self._catalogue.lora(lora_id)
        kind = record.manifest.facts.kind
        if kind not in (AdapterKind.LORA, AdapterKind.LORA_WITH_MEDUSA):
            raise InvalidArgumentError(
                f"{lora_id!r} holds no LoRA of its own; name the LoRAs to merge",
                reason=Reason.WRONG_ADAPTER_KIND,
                adapter_id=lora_id,
            )
        return record

    def _stored(self, wanted: _Wanted) -> Record | None:
        try:
            record = self._registry.resolve(wanted.id)
        except (NotFoundError, DataLossError):  # a damaged one is made again
            return None
        self._asked_at[wanted.id] = time.time()
        return record

    # -- in the merger's thread ---------------------------------------------------------------

    def _made(self, wanted: _Wanted, caller: str) -> Record:
        if (record := self._stored(wanted)) is not None:
            return record
        self._registry.check_writable()
        self._check_room()
        with self._sources(wanted) as sources:
            merge = Merge(sources, wanted.rule, wanted.key, self._shapes)
            # Bytes are staged under their hash, so the file is whole first; without a name it is
            # gone when the process ends, however that comes.
            with (
                disk_full_is_exhaustion(),
                tempfile.TemporaryFile(dir=self._config.store) as file,
            ):
                self._check_size(merge)
                merge.write(file, self._alive)
                file.flush()
                return self._store(wanted.id, merge, file, caller)

    @contextmanager
    def _sources(self, wanted: _Wanted) -> Iterator[list[MergeSource]]:
        """The LoRAs, parsed and checked; their files stay for the block."""
        with ExitStack() as held:
            sources = []
            for named, weight in wanted.loras:
                self._alive()
                record = self._registry.hold(f"{named.id}@{named.digest}")
                held.callback(self._registry.release, record)
                self._registry.verify(record.digest)
                files = self._registry.files(record.digest)
                parsed = parse(files, self._shapes, record.manifest.module_scales)
                sources.append(MergeSource(name=named.id, parsed=parsed, weight=weight))
            yield sources

    def _store(self, adapter_id: str, merge: Merge, weights: BinaryIO, caller: str) -> Record:
        config = io.BytesIO(merge.config)
        files = [
            _source_file(CONFIG_NAME, config, len(merge.config), self._alive),
            _source_file(WEIGHTS_NAME, weights, merge.num_bytes, self._alive),
        ]
        specs = [file.spec for file in files]
        upload = self._registry.begin_upload(adapter_id, specs, sender=caller)
        try:
            copy_missing(files, upload, lambda *_: self._alive())
        except BaseException:
            upload.abort()
            raise
        return self._uploader.submit(self._publish, upload).result()

    def _check_size(self, merge: Merge) -> None:
        """Raises before anything is written."""
        largest = self._config.max_upload
        if merge.num_bytes > largest:
            raise InvalidArgumentError(
                f"the merged adapter would have {merge.num_bytes} bytes in float32; at most "
                f"{largest} are accepted"
            )

    def _check_room(self) -> None:
        merged, unused = self._merged()
        if len(merged) >= self._config.max_merged and not unused:
            raise ResourceExhaustedError(
                f"{len(merged)} merged adapters are stored and in use: try again when one is "
                "not, or unload or delete one",
                reason=Reason.STORE_FULL,
            )

    def _alive(self) -> None:
        if self._closing:
            raise UnavailableError("the server stops: ask another one, or again later")

    # -- in the store's thread ----------------------------------------------------------------

    def _publish(self, upload: Upload) -> Record:
        # The sources passed for their base model's name when they were stored.
        record = self._writer.commit(upload, accept_base=True)
        self._asked_at[record.id] = time.time()
        merged, unused = self._merged()
        for old in unused[: max(len(merged) - self._config.max_merged, 0)]:
            if old.id != record.id:
                self._writer.delete(old.id, self._needed())
        left = {kept.id for kept in self._registry.list(MERGED)}
        for forgotten in self._asked_at.keys() - left:
            self._asked_at.pop(forgotten, None)
        return record

    def _merged(self) -> tuple[list[Record], list[Record]]:
        """All merged adapters; those that nothing needs, least recently used or asked for first."""
        merged, needed = self._registry.list(MERGED), self._needed()
        last_used = self._pool.stats().last_used

        def used_at(record: Record) -> float:
            asked_at = self._asked_at.get(record.id, record.created_at)
            return max(asked_at, last_used.get(record.digest, 0.0))

        unused = [record for record in merged if record.digest not in needed]
        return merged, sorted(unused, key=used_at)


def _rule(request: adapters_pb2.MergeAdaptersRequest) -> MergeRule:
    strategy, sign = _STRATEGIES.get(request.strategy), _SIGNS.get(request.majority_sign)
    density = _short(request.density)
    limits.check(0 < density <= 1, "density", "above 0 and at most 1", density)
    if strategy is None:
        raise InvalidArgumentError(
            "strategy must be TIES, DARE_LINEAR or DARE_TIES; a linear merge needs none: send the "
            "LoRAs as a stack",
            field="strategy",
        )
    if sign is None:
        raise InvalidArgumentError(
            "majority_sign must be TOTAL or FREQUENCY", field="majority_sign"
        )
    if strategy is Strategy.DARE_LINEAR:  # elects none, so all requests mean the same
        sign = MajoritySign.TOTAL
    return MergeRule(strategy=strategy, density=density, majority_sign=sign)


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 0.7 as its caller wrote it, as PEFT gets it."""
    return float(str(np.float32(value)))


def _source_file(name: str, file: BinaryIO, size: int, alive: Callable[[], None]) -> SourceFile:
    def read(offset: int) -> Pieces:
        return pieces_of(file, size, offset)

    return SourceFile(spec=describe(name, size, read(0), alive), read=read)
