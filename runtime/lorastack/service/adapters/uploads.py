"""PlanUpload and UploadAdapter: a stream of chunks becomes a stored adapter, or a rest to resume.

An upload that ends early (a broken connection, a stream cut short, no room for its bytes, a caller
who sends none) is suspended: its bytes wait for the caller's next try. One that breaks the rules is
aborted and leaves nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future

from lorastack.adapters.store.ids import check_new_id
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.adapters.store.upload import Upload
from lorastack.errors import AbortedError, InvalidArgumentError, LorastackError, Reason
from lorastack.service.adapters import messages
from lorastack.service.adapters.writer import StoreWriter
from lorastack.service.edge.limits import MAX_CHUNK
from lorastack.service.edge.places import Place, Places
from lorastack.service.edge.status import Notes
from lorastack.service.edge.threads import run_in
from lorastack.v1 import adapters_pb2

UPLOADS, UPLOADS_PER_CALLER = 512, 256  # at a time
EXPIRE_INTERVAL = 60.0  # seconds between two looks for uploads that nobody went on with
_RESUMABLE = (Reason.STAGING_FULL, Reason.UPLOAD_INCOMPLETE)

logger = logging.getLogger(__name__)


class Uploads:
    """readers: threads for plans. uploader: one thread of low priority for bytes and validation."""

    def __init__(
        self,
        *,
        max_files: int,
        registry: Registry,
        writer: StoreWriter,
        readers: Executor,
        uploader: Executor,
        idle: float,
    ) -> None:
        """idle: seconds that an upload may wait for its caller."""
        self._max_files = max_files
        self._registry = registry
        self._writer = writer
        self._readers = readers
        self._uploader = uploader
        self._places = Places("upload", together=UPLOADS, per_caller=UPLOADS_PER_CALLER, idle=idle)

    async def expire(self) -> None:
        """Removes uploads that nobody went on with, now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_INTERVAL)
            try:
                await run_in(self._uploader, self._registry.expire_uploads)
            except Exception:
                logger.exception("unfinished uploads could not be removed")

    async def plan(
        self, request: adapters_pb2.PlanUploadRequest
    ) -> adapters_pb2.PlanUploadResponse:
        """The blobs that the store lacks of an adapter. Raises InvalidArgumentError."""
        check_new_id(request.id)
        files = messages.file_specs(request.files, "files", self._max_files)
        needed = await run_in(self._readers, self._registry.plan_upload, request.id, files)
        return messages.needed_blobs(needed)

    async def receive(
        self,
        requests: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        caller: str,
        notes: Notes,
    ) -> Record:
        """Takes a header, then chunks until the stream ends, and commits. Raises what is wrong.

        notes: gets the adapter's id, for the log.
        """
        async with self._places.take(caller) as place:
            return await self._receive(requests, caller, place, notes)

    async def _receive(
        self,
        requests: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        caller: str,
        place: Place,
        notes: Notes,
    ) -> Record:
        first = await place.waits(anext(requests, None))
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgumentError("an upload starts with a header of id and files")
        header = first.header
        notes["adapter"] = header.id
        check_new_id(header.id)
        opening = self._uploader.submit(
            self._registry.begin_upload,
            header.id,
            messages.file_specs(header.files, "header.files", self._max_files),
            header.if_digest if header.HasField("if_digest") else None,
            sender=caller,
        )
        end = Upload.suspend
        try:
            upload = await asyncio.wrap_future(opening)
            try:
                await self._write_all(upload, requests, place)
            except LorastackError as error:
                if error.reason not in _RESUMABLE:
                    end = Upload.abort
                raise
            if upload.num_missing:
                # Perhaps a deletion took what was stored when the caller planned.
                raise AbortedError(
                    f"the upload of {upload.id!r} ended {upload.num_missing} bytes early; upload "
                    "it again, what has arrived is kept for that",
                    reason=Reason.UPLOAD_INCOMPLETE,
                    adapter_id=upload.id,
                )
            return await run_in(
                self._uploader, self._writer.commit, upload, accept_base=header.accept_base
            )
        finally:
            # The uploader's one thread gets to this after whatever it does for this upload now,
            # even when the caller has gone. After a commit there is nothing left to end.
            self._uploader.submit(_end, opening, end)

    async def _write_all(
        self,
        upload: Upload,
        requests: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        place: Place,
    ) -> None:
        while (message := await place.waits(anext(requests, None))) is not None:
            if message.WhichOneof("part") != "chunk":
                raise InvalidArgumentError("after an upload's header come chunks only")
            chunk = message.chunk
            if len(chunk.data) > MAX_CHUNK:
                raise InvalidArgumentError(
                    f"a chunk of {len(chunk.data)} bytes; send at most {MAX_CHUNK} at a time"
                )
            place.passed(len(chunk.data))
            await run_in(self._uploader, upload.write, chunk.sha256, chunk.offset, chunk.data)


def _end(opening: Future[Upload], end: Callable[[Upload], None]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        end(opening.result())
