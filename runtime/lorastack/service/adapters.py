"""AdapterService: what is stored, uploads, deletion. All file work runs in worker threads."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar

from google.protobuf.message import Message

from lorastack.adapters.host import HostCache
from lorastack.adapters.ids import check_id, split_reference
from lorastack.adapters.manifest import Record
from lorastack.adapters.pool import DevicePool
from lorastack.adapters.registry import Registry
from lorastack.adapters.upload import Upload, Validate
from lorastack.config import MIB
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    UnimplementedError,
)
from lorastack.service import convert
from lorastack.service.dispatch import Dispatcher
from lorastack.service.status import CallGuard, Context, new_request_id
from lorastack.v1 import adapters_pb2, adapters_pb2_grpc

MAX_CHUNK = MIB
DEFAULT_PAGE, MAX_PAGE = 100, 1000

P = ParamSpec("P")
T = TypeVar("T")


def _not_yet(name: str) -> Callable[[Any, Message, Context], Awaitable[NoReturn]]:
    """A call that this version does not have, answered as the contract says."""

    async def refuse(self: Any, request: Message, context: Context) -> NoReturn:
        async with self._guard(context, new_request_id()):
            raise UnimplementedError(f"{name} is not implemented in this version", rpc=name)

    return refuse


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """validate: checks a staged folder against the base model, raising what is wrong with it.

    readers run look-ups; uploader is one thread of low priority for uploads and their validation.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        pool: DevicePool,
        host: HostCache,
        dispatcher: Dispatcher,
        validate: Validate,
        fingerprint: str,
        default_medusa: str,
        guard: CallGuard,
        readers: Executor,
        uploader: Executor,
    ) -> None:
        self._registry = registry
        self._pool = pool
        self._host = host
        self._dispatcher = dispatcher
        self._validate = validate
        self._fingerprint = fingerprint
        self._default_medusa = default_medusa
        self._guard = guard
        self._readers = readers
        self._uploader = uploader

    async def PlanUpload(
        self, request: adapters_pb2.PlanUploadRequest, context: Context
    ) -> adapters_pb2.PlanUploadResponse:
        async with self._guard(context, new_request_id()):
            check_id(request.id)
            files = convert.file_specs(request.files)
            needed = await _run(self._readers, self._registry.plan_upload, request.id, files)
        return convert.needed_blobs(needed)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard(context, new_request_id()):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("part") != "header":
                raise InvalidArgumentError("an upload starts with a header of id and files")
            header = first.header
            opening = self._uploader.submit(
                self._registry.begin_upload,
                header.id,
                convert.file_specs(header.files),
                header.if_digest if header.HasField("if_digest") else None,
            )
            try:
                upload = await asyncio.wrap_future(opening)
                await self._receive(upload, request_iterator)
                record = await _run(self._uploader, self._commit, upload)
            finally:
                # The uploader's one thread gets to this after whatever it does for this upload now,
                # even when the caller has gone.
                self._uploader.submit(_abort, opening)
        return self._adapter(record, self._usage())

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Context
    ) -> adapters_pb2.Adapter:
        async with self._guard(context, new_request_id()):
            record = await _run(self._readers, self._registry.resolve, request.id)
        return self._adapter(record, self._usage())

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        async with self._guard(context, new_request_id()):
            after = _page_start(request.page_token)
            found = await _run(self._readers, self._registry.list, request.id_prefix)
            rest = [record for record in found if record.id > after]
        usage = self._usage()
        page = rest[: min(request.page_size or DEFAULT_PAGE, MAX_PAGE)]
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self._adapter(record, usage) for record in page],
            next_page_token=_page_token(page[-1].id) if len(rest) > len(page) else "",
        )

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        async with self._guard(context, new_request_id()):
            if request.id == split_reference(self._default_medusa)[0]:
                raise FailedPreconditionError(
                    f"{request.id!r} holds the server's default Medusa heads; restart the server "
                    "without --medusa to delete them",
                    reason=Reason.ADAPTER_IN_USE,
                    adapter_id=request.id,
                )
            delete = partial(
                self._registry.delete, request.id, in_use=self._dispatcher.digests_in_use()
            )
            await _run(self._uploader, delete)
        return adapters_pb2.DeleteAdapterResponse()

    PullAdapter = _not_yet("PullAdapter")
    DownloadAdapter = _not_yet("DownloadAdapter")
    ListRevisions = _not_yet("ListRevisions")
    RollbackAdapter = _not_yet("RollbackAdapter")
    LoadAdapter = _not_yet("LoadAdapter")
    UnloadAdapter = _not_yet("UnloadAdapter")
    SetDefaultMedusa = _not_yet("SetDefaultMedusa")

    async def _receive(
        self, upload: Upload, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]
    ) -> None:
        async for message in messages:
            if message.WhichOneof("part") != "chunk":
                raise InvalidArgumentError("after an upload's header come chunks only")
            chunk = message.chunk
            if len(chunk.data) > MAX_CHUNK:
                raise InvalidArgumentError(
                    f"a chunk of {len(chunk.data)} bytes; send at most {MAX_CHUNK} at a time"
                )
            await _run(self._uploader, upload.write, chunk.sha256, chunk.offset, chunk.data)

    def _commit(self, upload: Upload) -> Record:
        return upload.commit(self._validate, base_fingerprint=self._fingerprint)

    def _usage(self) -> convert.AdapterUsage:
        return convert.AdapterUsage(
            device_bytes={digest: nbytes for digest, nbytes, _ in self._pool.resident()},
            on_host=self._host.snapshot(),
            in_flight=self._dispatcher.digests_in_use(),
        )

    def _adapter(self, record: Record, usage: convert.AdapterUsage) -> adapters_pb2.Adapter:
        compatible = record.manifest.base_fingerprint == self._fingerprint
        return convert.adapter(record, compatible=compatible, usage=usage)


async def _run(pool: Executor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, partial(call, *args, **kwargs))


def _abort(opening: Future[Upload]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()


def _page_token(last_id: str) -> str:
    """Where the next page starts; opaque to callers."""
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _page_start(token: str) -> str:
    """The id after which a page starts. Raises InvalidArgumentError for a token not ours."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError:
        raise InvalidArgumentError(
            "page_token is not one that ListAdapters gave; leave it empty to start over",
            field="page_token",
        ) from None
