"""PullAdapter and DownloadAdapter: from a hub or a folder into the store, and out of it again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, nullcontext

from lorastack.adapters.memory.threads import be_nice
from lorastack.adapters.sources.base import PIECE, Limits, Source, copy_missing
from lorastack.adapters.sources.folder import find_files
from lorastack.adapters.sources.hub import HubAddress, open_hub
from lorastack.adapters.store.blobs import damaged_blob
from lorastack.adapters.store.ids import check_new_id
from lorastack.adapters.store.manifest import FileSpec, Record
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig
from lorastack.errors import (
    InvalidArgumentError,
    NotFoundError,
    Reason,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.service.adapters.writer import StoreWriter
from lorastack.service.edge.places import Places
from lorastack.service.edge.threads import run_in
from lorastack.v1 import adapters_pb2

NUM_PULLERS = 2  # pulls at a time; others queue
PULLS, PULLS_PER_CALLER = 64, 32  # waiting ones too
DOWNLOADS, DOWNLOADS_PER_CALLER = 256, 128  # at a time
NEWS_INTERVAL = 0.1  # seconds between two messages of progress

Describe = Callable[[Record], adapters_pb2.Adapter]


class Transfers:
    """Pulls run in threads of low priority of their own, so a slow hub holds up no upload.

    uploader is the one thread that changes the store; it also reads what is downloaded.
    """

    def __init__(
        self,
        *,
        config: AdapterConfig,
        registry: Registry,
        writer: StoreWriter,
        uploader: Executor,
    ) -> None:
        self._orgs = config.pull_orgs
        self._roots = config.pull_roots
        self._limits = Limits(max_files=config.max_files, max_bytes=config.max_upload)
        self._registry = registry
        self._writer = writer
        self._uploader = uploader
        # Idle is a caller that does not read the answer that is being written.
        idle = config.transfer_idle
        self.pulls = Places("pull", together=PULLS, per_caller=PULLS_PER_CALLER, idle=idle)
        self.downloads = Places(
            "download", together=DOWNLOADS, per_caller=DOWNLOADS_PER_CALLER, idle=idle
        )
        self._pullers = ThreadPoolExecutor(NUM_PULLERS, "lorastack-pull", initializer=be_nice)

    def close(self) -> None:
        """Waits for pulls that run; their callers have gone, so they end at their next piece."""
        self._pullers.shutdown(cancel_futures=True)

    async def pull(
        self, request: adapters_pb2.PullAdapterRequest, caller: str, describe: Describe
    ) -> AsyncGenerator[adapters_pb2.PullAdapterResponse, None]:
        """Progress as it changes, then one message with the adapter. Closing it ends the pull.

        Raises what the source refuses and what an upload of the same files raises.
        """
        progress = _Progress(asyncio.get_running_loop())
        pulling = self._pullers.submit(self._pull, request, caller, progress)
        pulling.add_done_callback(progress.wake)
        try:
            while not pulling.done():
                if (latest := await progress.next()) is not None:
                    done, total = latest
                    yield adapters_pb2.PullAdapterResponse(done_bytes=done, total_bytes=total)
            record, left_out = await asyncio.wrap_future(pulling)
        finally:
            progress.cancelled = True
            pulling.cancel()
        size = record.size_bytes
        yield adapters_pb2.PullAdapterResponse(
            done_bytes=size, total_bytes=size, adapter=describe(record), left_out=left_out
        )

    async def download(
        self, request: adapters_pb2.DownloadAdapterRequest
    ) -> AsyncGenerator[adapters_pb2.DownloadAdapterResponse, None]:
        """Every file's spec and then its bytes, hashed once more on the way.

        Raises NotFoundError, and DataLossError if the stored bytes are not what they were.
        """
        # From here on a deletion of the id, or a new revision, changes nothing.
        holding = self._uploader.submit(self._registry.hold, request.id)
        try:
            record = await asyncio.wrap_future(holding)
            for spec in record.files:
                yield adapters_pb2.DownloadAdapterResponse(
                    file=adapters_pb2.FileSpec(name=spec.name, size=spec.size, sha256=spec.sha256)
                )
                async with aclosing(self._bytes_of(record, spec)) as parts:
                    async for data in parts:
                        yield adapters_pb2.DownloadAdapterResponse(data=data)
        finally:
            self._uploader.submit(self._release, holding)

    async def _bytes_of(self, record: Record, spec: FileSpec) -> AsyncGenerator[bytes, None]:
        """A file in pieces. Raises DataLossError if it has changed, NotFoundError if it is gone."""
        digest, offset = hashlib.sha256(), 0
        while data := await run_in(self._uploader, self._read, record, spec, offset):
            digest.update(data)
            offset += len(data)
            yield data
        if digest.hexdigest() != spec.sha256:
            # Raises the same, unless an upload has healed the file by now.
            await run_in(self._uploader, self._registry.verify_file, spec, record.digest)
            raise damaged_blob(spec, record.digest)

    def _read(self, record: Record, spec: FileSpec, offset: int) -> bytes:
        """The next piece of a stored file. It is open only here: the caller may never read on."""
        try:
            with self._registry.path(spec).open("rb") as file:
                file.seek(offset)
                return file.read(PIECE)
        except FileNotFoundError:
            self._registry.verify_file(spec, record.digest)  # says whether it was deleted or lost
            raise NotFoundError(f"adapter {record.id!r} was replaced; ask again") from None

    def _release(self, holding: Future[Record]) -> None:
        if not holding.cancelled() and holding.exception() is None:
            self._registry.release(holding.result())

    def _pull(
        self, request: adapters_pb2.PullAdapterRequest, caller: str, progress: _Progress
    ) -> tuple[Record, Sequence[str]]:
        """The stored adapter, and the names of files that were left where they came from."""
        check_new_id(request.id)
        if_digest = request.if_digest if request.HasField("if_digest") else None
        with self._source(request, progress.check) as source:
            specs = [file.spec for file in source.files]
            upload = self._registry.begin_upload(request.id, specs, if_digest, sender=caller)
            try:
                copy_missing(source.files, upload, progress.report)
            except (UnavailableError, RequestCancelledError, ResourceExhaustedError) as error:
                # A later pull of the same files goes on from here; a full disk is not kept full.
                if error.reason is Reason.STORE_FULL:
                    upload.abort()
                upload.suspend()
                raise
            except BaseException:
                upload.abort()
                raise
            commit = self._writer.commit
            committing = self._uploader.submit(commit, upload, accept_base=request.accept_base)
            return committing.result(), source.left_out

    def _source(
        self, request: adapters_pb2.PullAdapterRequest, alive: Callable[[], None]
    ) -> AbstractContextManager[Source]:
        """alive: raises once nobody waits for the pull."""
        source = request.WhichOneof("source")
        if source == "hub_id":
            address = HubAddress(
                hub_id=request.hub_id, revision=request.revision or "main", token=request.token
            )
            return open_hub(address, self._orgs, self._limits, alive)
        if source == "folder":
            if request.revision or request.token:
                raise InvalidArgumentError("revision and token belong to a hub_id, not to a folder")
            return nullcontext(find_files(request.folder, self._roots, self._limits, alive))
        raise InvalidArgumentError("a pull names a hub_id or a folder", field="source")


class _Progress:
    """What a pull's thread tells its caller; only the latest news counts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.cancelled = False
        self._loop = loop
        self._changed = asyncio.Event()
        self._latest: tuple[int, int] | None = None
        self._next_news = 0.0  # time.monotonic()

    def check(self) -> None:
        """For the pull's thread. Raises RequestCancelledError once nobody listens."""
        if self.cancelled:
            raise RequestCancelledError("the caller of the pull has gone")

    def report(self, done: int, total: int) -> None:
        """For the pull's thread: bytes. Raises as `check` does."""
        self.check()
        if time.monotonic() >= self._next_news:
            self._next_news = time.monotonic() + NEWS_INTERVAL
            self._latest = (done, total)
            self.wake()

    def wake(self, _: object = None) -> None:
        """Any thread: `next` has something to return."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def next(self) -> tuple[int, int] | None:
        """News since the last call, or None if the pull has ended without."""
        await self._changed.wait()
        self._changed.clear()
        latest, self._latest = self._latest, None
        return latest
