"""The client for threads: every call of the server."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

import grpc

from lorastack.client.calls import (
    CHANNEL_OPTIONS,
    DEFAULT_SERVER,
    PAGE_SIZE,
    Patience,
    Progress,
    check_server,
    our_errors,
)
from lorastack.client.downloading import new_folder, receive_files
from lorastack.client.merging import MajoritySign, Strategy, merge_request
from lorastack.client.uploading import adapter_files, file_spec, send_files
from lorastack.errors import ResourceExhaustedError
from lorastack.folders import ALIAS_NAME
from lorastack.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from lorastack.v1.adapters_pb2 import Adapter
from lorastack.v1.generation_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GenerateStreamResponse,
    GetMetricsResponse,
    GetModelInfoResponse,
    LoraRef,
    TokenizeRequest,
)

LeftOut = Callable[[Sequence[str]], None]
INTERRUPTED_SECONDS = 1.0  # for closing, after Ctrl-C


class Client:
    """One channel to a server. Thread-safe; close it or use it as a context manager.

    timeout: seconds, the gRPC deadline of a call; None waits as long as it takes.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, retries: int = 0) -> None:
        """retries: how often a request for which the server has no room is sent again (QUEUE_FULL,
        TOO_MANY_CALLS), each time after the seconds that it asks for and within the call's timeout.

        Raises InvalidArgumentError for an address that cannot be one. Connects at the first call.
        """
        check_server(server)
        self._server = server
        self._retries = retries
        self._channel = grpc.insecure_channel(server, options=CHANNEL_OPTIONS)
        # Generated stubs are untyped; every method below names the type of its reply.
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.close()
            return
        # It may have come while gRPC began a call, whose end gRPC would then await for ever.
        thread = Thread(target=self.close, name="lorastack-close", daemon=True)
        thread.start()
        thread.join(INTERRUPTED_SECONDS)

    def close(self) -> None:
        """Closes the channel, which ends running calls."""
        self._channel.close()

    def generate(
        self, request: GenerateRequest, *, timeout: float | None = None
    ) -> GenerateResponse:
        """Returns the whole reply at once."""
        reply: GenerateResponse = self._call(self._generation.Generate, request, timeout)
        return reply

    def stream(
        self, request: GenerateRequest, *, timeout: float | None = None
    ) -> Iterator[GenerateStreamResponse]:
        """Yields the reply as it is made; the last message has `final`. Closing it cancels."""
        patience = Patience(self._retries, timeout)
        begin = partial(self._generation.GenerateStream, request)
        return self._retried(begin, begin(timeout=patience.left()), patience)

    def tokenize(self, request: TokenizeRequest, *, timeout: float | None = None) -> list[int]:
        """The token ids that Generate would run."""
        return list(self._call(self._generation.Tokenize, request, timeout).token_ids)

    def model_info(self, *, timeout: float | None = None) -> GetModelInfoResponse:
        """What the server serves, and its limits."""
        reply: GetModelInfoResponse = self._call(
            self._generation.GetModelInfo, generation_pb2.GetModelInfoRequest(), timeout
        )
        return reply

    def metrics(self, accept: str = "", *, timeout: float | None = None) -> GetMetricsResponse:
        """A scrape for Prometheus and routers. accept: as HTTP's; "": Prometheus' classic text."""
        request = generation_pb2.GetMetricsRequest(accept=accept)
        reply: GetMetricsResponse = self._call(self._generation.GetMetrics, request, timeout)
        return reply

    def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """One adapter; `id@sha256:...` names a revision. Raises NotFoundError."""
        request = adapters_pb2.GetAdapterRequest(id=adapter_id)
        reply: Adapter = self._call(self._adapters.GetAdapter, request, timeout)
        return reply

    def list_adapters(self, prefix: str = "", *, timeout: float | None = None) -> list[Adapter]:
        """All adapters whose id starts with prefix, by id; timeout counts per page."""
        adapters: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, id_prefix=prefix)
        while True:
            page = self._call(self._adapters.ListAdapters, request, timeout)
            adapters.extend(page.adapters)
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    def delete_adapter(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """Deletes an id with all its revisions. Raises NotFoundError."""
        request = adapters_pb2.DeleteAdapterRequest(id=adapter_id)
        self._call(self._adapters.DeleteAdapter, request, timeout)

    def list_revisions(self, adapter_id: str, *, timeout: float | None = None) -> list[Adapter]:
        """An id's revisions, newest first. Raises NotFoundError."""
        request = adapters_pb2.ListRevisionsRequest(id=adapter_id)
        return list(self._call(self._adapters.ListRevisions, request, timeout).revisions)

    def rollback(self, adapter_id: str, digest: str, *, timeout: float | None = None) -> Adapter:
        """Makes an earlier revision's content the newest one; 8 digits of its digest may do.

        Raises NotFoundError.
        """
        request = adapters_pb2.RollbackAdapterRequest(id=adapter_id, digest=digest)
        reply: Adapter = self._call(self._adapters.RollbackAdapter, request, timeout)
        return reply

    def prune_revisions(
        self, adapter_id: str = "", *, keep: int | None = None, timeout: float | None = None
    ) -> adapters_pb2.PruneRevisionsResponse:
        """Removes old revisions of an id ("": of every id) and the bytes that only they used.

        keep: newest revisions of an id that stay; None: the server's own number. Raises
        NotFoundError.
        """
        request = adapters_pb2.PruneRevisionsRequest(id=adapter_id, keep=keep)
        reply: adapters_pb2.PruneRevisionsResponse
        reply = self._call(self._adapters.PruneRevisions, request, timeout)
        return reply

    def disk_usage(self, *, timeout: float | None = None) -> tuple[int, int]:
        """Bytes on the server's disk: (all adapters with revisions, unfinished uploads)."""
        request = adapters_pb2.ListAdaptersRequest(page_size=1)
        page = self._call(self._adapters.ListAdapters, request, timeout)
        return page.stored_bytes, page.staging_bytes

    def load(self, adapter_id: str, *, pin: bool = False, timeout: float | None = None) -> Adapter:
        """Brings an adapter onto the device and waits for it. pin: keeps it there until `unload`.

        Raises FailedPreconditionError if it can never fit, and ResourceExhaustedError naming the
        pinned adapters in its way.
        """
        request = adapters_pb2.LoadAdapterRequest(id=adapter_id, pin=pin)
        reply: Adapter = self._call(self._adapters.LoadAdapter, request, timeout)
        return reply

    def unload(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """Removes an adapter's pin and its copies in memory; running requests keep theirs."""
        request = adapters_pb2.UnloadAdapterRequest(id=adapter_id)
        reply: Adapter = self._call(self._adapters.UnloadAdapter, request, timeout)
        return reply

    def set_default_medusa(
        self, medusa_id: str, *, timeout: float | None = None
    ) -> adapters_pb2.SetDefaultMedusaResponse:
        """Sets the heads of requests that name none, kept across restarts; "": no heads.

        Raises FailedPreconditionError if the server was started with --medusa.
        """
        request = adapters_pb2.SetDefaultMedusaRequest(medusa_id=medusa_id)
        reply: adapters_pb2.SetDefaultMedusaResponse = self._call(
            self._adapters.SetDefaultMedusa, request, timeout
        )
        return reply

    def merge(
        self,
        loras: Sequence[LoraRef],
        strategy: Strategy,
        density: float,
        *,
        majority_sign: MajoritySign = "total",
        timeout: float | None = None,
    ) -> Adapter:
        """Merges two or more LoRAs into a stored one, as PEFT does; equal requests give the same.

        A LoRA's scale is its weight; density: the share of values that stays, above 0 and up to 1.
        The server may delete merged adapters that nothing has used for longest. Raises
        InvalidArgumentError for LoRAs of different ranks.
        """
        request = merge_request(loras, strategy, density, majority_sign)
        reply: Adapter = self._call(self._adapters.MergeAdapters, request, timeout)
        return reply

    def upload(
        self,
        folder: Path,
        adapter_id: str,
        *,
        if_digest: str | None = None,
        accept_base: bool = False,
        progress: Progress | None = None,
        left_out: LeftOut | None = None,
    ) -> Adapter:
        """Stores a folder's adapter under an id; files that the server has are not sent again.

        When the connection breaks, the server has no room for now, or a deletion takes files that
        it counted on, it waits `uploading.RETRY_DELAYS` and goes on from the bytes that arrived.
        if_digest: "": the id must be new; a digest: it must point there; None: replaces. After a
        lost answer it may refuse an upload that has succeeded. accept_base: the config may name
        another base model. progress: called with (bytes done, bytes in all) of the files that the
        server lacks. left_out: called with the names of files that are not sent: optimizer states
        and other pickles, logs, hidden files. Raises InvalidArgumentError for a folder without
        weights that may be sent, and what the server raises.
        """
        paths, others = adapter_files(folder)
        if others and left_out is not None:
            left_out(others)
        header = adapters_pb2.UploadHeader(
            id=adapter_id,
            files=[file_spec(path) for path in paths],
            if_digest=if_digest,
            accept_base=accept_base,
        )
        return send_files(self._adapters, self._server, header, paths, progress)

    def alias(
        self,
        alias_id: str,
        loras: Sequence[tuple[str, float]] = (),
        medusa_id: str = "",
        *,
        if_digest: str | None = None,
    ) -> Adapter:
        """Stores a name for LoRAs, (id, scale) pairs, and heads: requests give it as lora_id.

        medusa_id: "" leaves the heads to the request, "none" means no heads; if_digest: as in
        `upload`. Raises NotFoundError or InvalidArgumentError that says which id is wrong.
        """
        entries = [{"lora_id": lora_id, "scale": scale} for lora_id, scale in loras]
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps({"loras": entries, "medusa_id": medusa_id})
            Path(folder, ALIAS_NAME).write_text(text, encoding="utf-8")
            return self.upload(Path(folder), alias_id, if_digest=if_digest)

    def pull(
        self,
        adapter_id: str,
        *,
        hub_id: str = "",
        folder: str = "",
        revision: str = "",
        token: str = "",
        if_digest: str | None = None,
        accept_base: bool = False,
        progress: Progress | None = None,
        left_out: LeftOut | None = None,
    ) -> Adapter:
        """Lets the server fetch an adapter: from a hub, or from a folder of its own machine.

        Give hub_id (organisation/name; with revision, and token if it is private) or folder.
        if_digest, accept_base, progress and left_out: as in `upload`. Raises PermissionDeniedError
        if the server does not pull from there, UnavailableError if the hub fails, and as `upload`.
        """
        request = adapters_pb2.PullAdapterRequest(
            id=adapter_id,
            revision=revision,
            token=token,
            if_digest=if_digest,
            accept_base=accept_base,
        )
        if hub_id:
            request.hub_id = hub_id
        if folder:
            request.folder = folder
        reply = adapters_pb2.PullAdapterResponse()
        for reply in self._parts(self._adapters.PullAdapter(request)):
            if progress is not None:
                progress(reply.done_bytes, reply.total_bytes)
        if reply.left_out and left_out is not None:
            left_out(reply.left_out)
        return reply.adapter

    def download(
        self, adapter_id: str, folder: Path, *, progress: Progress | None = None
    ) -> Adapter:
        """Writes an adapter's files into a new folder, which appears whole or not at all.

        `id@sha256:...` names a revision; progress: called with (received bytes, bytes in all).
        Raises FailedPreconditionError for a folder that is not empty, NotFoundError, and
        DataLossError when a file does not have its sha256.
        """
        with new_folder(folder) as staged:
            adapter = self.get_adapter(adapter_id)
            # By its digest: a new revision meanwhile is not mixed in.
            request = adapters_pb2.DownloadAdapterRequest(id=f"{adapter.id}@{adapter.digest}")
            parts = self._parts(self._adapters.DownloadAdapter(request))
            receive_files(staged, parts, adapter.size_bytes, progress)
        return adapter

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        patience = Patience(self._retries, timeout)
        while True:
            try:
                with our_errors(self._server):
                    return method(request, timeout=patience.left())
            except ResourceExhaustedError as error:
                delay = patience.delay(error)
            time.sleep(delay)

    def _retried(self, begin: Callable[..., Any], call: Any, patience: Patience) -> Iterator[Any]:
        """Yields the call's messages; begins it again only while it has given none."""
        while True:
            begun = False
            try:
                with closing(self._parts(call)) as parts:
                    for part in parts:
                        begun = True
                        yield part
                return
            except ResourceExhaustedError as error:
                if begun:
                    raise
                delay = patience.delay(error)
            time.sleep(delay)
            call = begin(timeout=patience.left())

    def _parts(self, call: Any) -> Generator[Any]:
        """Yields a server stream's messages; the call ends with the iterator."""
        try:
            with our_errors(self._server):
                yield from call
        finally:
            call.cancel()
