"""AdapterService: uploads, revisions, residency. All file work runs in worker threads."""

from __future__ import annotations

import asyncio
import base64
from bisect import bisect_right
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import Executor
from contextlib import aclosing

from lorastack.adapters.catalogue import Catalogue, check_no_alias
from lorastack.adapters.memory.host import HostCache
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.engine.engine import Engine
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
)
from lorastack.service.adapters import messages
from lorastack.service.adapters.merging import Merges
from lorastack.service.adapters.transfer import Transfers
from lorastack.service.adapters.uploads import Uploads
from lorastack.service.adapters.writer import StoreWriter
from lorastack.service.calls.dispatch import Dispatcher
from lorastack.service.edge.places import caller_of
from lorastack.service.edge.status import CallGuard, Context, Notes, new_request_id
from lorastack.service.edge.threads import run_in
from lorastack.v1 import adapters_pb2, adapters_pb2_grpc

DEFAULT_PAGE, MAX_PAGE = 100, 1000


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """readers: threads for look-ups. uploader: the one thread, of low priority, for all changes."""

    def __init__(
        self,
        *,
        registry: Registry,
        writer: StoreWriter,
        uploads: Uploads,
        transfers: Transfers,
        merges: Merges,
        engine: Engine,
        pool: DevicePool,
        host: HostCache,
        dispatcher: Dispatcher,
        catalogue: Catalogue,
        guard: CallGuard,
        readers: Executor,
        uploader: Executor,
    ) -> None:
        self._registry = registry
        self._writer = writer
        self._transfers = transfers
        self._merges = merges
        self._engine = engine
        self._pool = pool
        self._host = host
        self._dispatcher = dispatcher
        self._catalogue = catalogue
        self._guard = guard
        self._readers = readers
        self._uploader = uploader
        self._uploads = uploads

    # -- into the store and out of it -------------------------------------------------------------

    async def PlanUpload(
        self, request: adapters_pb2.PlanUploadRequest, context: Context
    ) -> adapters_pb2.PlanUploadResponse:
        async with self._guard("PlanUpload", context, new_request_id()):
            return await self._uploads.plan(request)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard("UploadAdapter", context, new_request_id()) as notes:
            return self._noted(
                notes, await self._uploads.receive(request_iterator, caller_of(context), notes)
            )

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        async with self._guard("DeleteAdapter", context, new_request_id()) as notes:
            notes["adapter"] = request.id
            in_use = self._dispatcher.digests_in_use()
            await run_in(self._uploader, self._delete, request.id, in_use)
        return adapters_pb2.DeleteAdapterResponse()

    async def PullAdapter(self, request: adapters_pb2.PullAdapterRequest, context: Context) -> None:
        caller = caller_of(context)
        async with (
            self._guard("PullAdapter", context, new_request_id()) as notes,
            self._transfers.pulls.take(caller) as place,
            aclosing(self._transfers.pull(request, caller, self._message)) as parts,
        ):
            notes["adapter"], notes["source"] = request.id, request.hub_id or request.folder
            async for part in parts:
                if part.HasField("adapter"):
                    notes["digest"] = part.adapter.digest
                await place.waits(context.write(part))
                place.passed(part.ByteSize())

    async def DownloadAdapter(
        self, request: adapters_pb2.DownloadAdapterRequest, context: Context
    ) -> None:
        async with (
            self._guard("DownloadAdapter", context, new_request_id()) as notes,
            self._transfers.downloads.take(caller_of(context)) as place,
            aclosing(self._transfers.download(request)) as parts,
        ):
            notes["adapter"] = request.id
            async for part in parts:
                await place.waits(context.write(part))
                place.passed(part.ByteSize())

    async def MergeAdapters(
        self, request: adapters_pb2.MergeAdaptersRequest, context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard("MergeAdapters", context, new_request_id()) as notes:
            return self._noted(notes, await self._merges.merge(request, caller_of(context)))

    # -- what is stored ---------------------------------------------------------------------------

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard("GetAdapter", context, new_request_id()):
            record = await run_in(self._readers, self._registry.resolve, request.id)
            return self._message(record)

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        async with self._guard("ListAdapters", context, new_request_id()):
            after = _page_start(request.page_token)
            records = await run_in(self._readers, self._registry.list, request.id_prefix)
            start = bisect_right(records, after, key=lambda record: record.id)
            end = start + min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
            page = records[start:end]
            return adapters_pb2.ListAdaptersResponse(
                adapters=await run_in(self._readers, self._messages, page, self._usage()),
                next_page_token=_page_token(page[-1].id) if end < len(records) else "",
                stored_bytes=self._registry.stored_bytes(),
                staging_bytes=self._registry.staging_bytes(),
            )

    async def ListRevisions(
        self, request: adapters_pb2.ListRevisionsRequest, context: Context
    ) -> adapters_pb2.ListRevisionsResponse:
        async with self._guard("ListRevisions", context, new_request_id()):
            records = await run_in(self._readers, self._registry.revisions, request.id)
            revisions = self._messages(records, self._usage())
            return adapters_pb2.ListRevisionsResponse(revisions=revisions)

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard("RollbackAdapter", context, new_request_id()) as notes:
            notes["adapter"] = request.id
            rollback = self._writer.rollback
            notes["digest"] = request.digest
            record = await run_in(self._uploader, rollback, request.id, request.digest)
            return self._noted(notes, record)

    async def PruneRevisions(
        self, request: adapters_pb2.PruneRevisionsRequest, context: Context
    ) -> adapters_pb2.PruneRevisionsResponse:
        async with self._guard("PruneRevisions", context, new_request_id()) as notes:
            keep = request.keep if request.HasField("keep") else None
            if keep == 0:
                raise InvalidArgumentError(
                    "keep must be at least 1: an id always has a newest revision", field="keep"
                )
            notes["adapter"] = request.id or "all"
            pruned = await run_in(self._uploader, self._writer.prune, request.id, keep)
            notes["removed"] = pruned.num_revisions
            return adapters_pb2.PruneRevisionsResponse(
                removed_revisions=pruned.num_revisions, freed_bytes=pruned.num_bytes
            )

    # -- what is in memory ------------------------------------------------------------------------

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard("LoadAdapter", context, new_request_id()) as notes:
            notes["adapter"] = request.id
            notes["pin"] = request.pin
            record = await run_in(self._readers, self._catalogue.servable, request.id)
            check_no_alias(record, "load what it stands for")
            await self._load(record, request.pin)
            return self._noted(notes, record)

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard("UnloadAdapter", context, new_request_id()) as notes:
            notes["adapter"] = request.id
            record = await run_in(self._readers, self._registry.resolve, request.id)
            check_no_alias(record, "unload what it stands for")
            await asyncio.wrap_future(self._engine.unload(record.digest))
            return self._noted(notes, record)

    async def SetDefaultMedusa(
        self, request: adapters_pb2.SetDefaultMedusaRequest, context: Context
    ) -> adapters_pb2.SetDefaultMedusaResponse:
        async with self._guard("SetDefaultMedusa", context, new_request_id()) as notes:
            notes["adapter"] = request.medusa_id
            set_default = self._catalogue.set_default_medusa
            heads = await run_in(self._uploader, set_default, request.medusa_id)
            notes["digest"] = heads.digest if heads else ""
            return adapters_pb2.SetDefaultMedusaResponse(
                medusa_id=heads.medusa_id if heads else "",
                medusa_digest=heads.digest if heads else "",
            )

    async def _load(self, record: Record, pin: bool) -> None:
        """Loads it, and the heads that it corrects. Raises what the load raises; NotFoundError if
        any of them was deleted meanwhile."""
        digests = await run_in(self._readers, self._catalogue.digests_of, record)
        try:
            await asyncio.wrap_future(self._engine.load(record.digest, pin, digests))
        except LorastackError as error:
            raise self._catalogue.with_ids(error) from None
        finally:
            deleted = [digest for digest in digests if not self._registry.knows(digest)]
            for digest in deleted:
                # The load may have undone what the deletion told the engine.
                self._uploader.submit(self._writer.forget_deleted, digest)
        if deleted:
            raise NotFoundError(
                f"adapter {record.id!r} was deleted or replaced while it was loaded; ask again",
                adapter_id=record.id,
            )

    def _delete(self, adapter_id: str, in_use: Collection[str]) -> None:
        if self._catalogue.holds_default(adapter_id):
            raise FailedPreconditionError(
                f"{adapter_id!r} holds the server's default Medusa heads; choose others with "
                "`lorastack adapters default` (or restart without --medusa) to delete them",
                reason=Reason.ADAPTER_IN_USE,
                adapter_id=adapter_id,
            )
        self._writer.delete(adapter_id, in_use)

    def _noted(self, notes: Notes, record: Record) -> adapters_pb2.Adapter:
        """A record's message; notes its id and digest for the log."""
        notes["adapter"], notes["digest"] = record.id, record.digest
        return self._message(record)

    def _message(self, record: Record) -> adapters_pb2.Adapter:
        return self._messages([record], self._usage())[0]

    def _messages(
        self, records: Sequence[Record], usage: messages.AdapterUsage
    ) -> list[adapters_pb2.Adapter]:
        is_compatible = self._catalogue.is_compatible
        return [messages.adapter(r, compatible=is_compatible(r), usage=usage) for r in records]

    def _usage(self) -> messages.AdapterUsage:
        stats = self._pool.stats()
        return messages.AdapterUsage(
            on_device={adapter.digest: adapter for adapter in stats.adapters},
            on_host=self._host.snapshot(),
            in_flight=self._dispatcher.digests_in_use(),
            last_used=stats.last_used,
        )


def _page_token(last_id: str) -> str:
    """The token of the page that follows this id; opaque to callers."""
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _page_start(token: str) -> str:
    """The id that a page follows. Raises InvalidArgumentError for a token that is not ours."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError:
        raise InvalidArgumentError(
            "page_token is not one that ListAdapters gave; leave it empty to start over",
            field="page_token",
        ) from None
