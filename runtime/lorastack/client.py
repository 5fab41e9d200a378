"""A typed, synchronous client: generate, stream, upload. Needs neither torch nor transformers.

    with Client() as client:
        print(client.generate(GenerateRequest(prompt="Hello", lora_id="lora-gsm8k")).text)

Requests and replies are the messages of lorastack.v1; those that callers build or read most are
names of this module too. A failed call raises the class of
lorastack.errors that belongs to its status, with the server's reason and metadata.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lorastack.codes import CODES
from lorastack.config import KIB, MIB
from lorastack.errors import (
    AbortedError,
    InternalError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.folders import Receiver, adapter_files, folder_files, new_folder
from lorastack.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from lorastack.v1.adapters_pb2 import Adapter
from lorastack.v1.generation_pb2 import (
    OFF,
    ChatMessage,
    ChatMessages,
    GenerateRequest,
    GenerateResponse,
    LoraRef,
    SamplingParams,
    Speculation,
    StopParams,
    TokenIds,
    TokenizeRequest,
)

__all__ = [
    "DEFAULT_SERVER",
    "ERRORS",
    "OFF",
    "Adapter",
    "ChatMessage",
    "ChatMessages",
    "Client",
    "GenerateRequest",
    "GenerateResponse",
    "LoraRef",
    "SamplingParams",
    "Speculation",
    "StopParams",
    "TokenIds",
    "TokenizeRequest",
    "folder_files",
    "to_error",
]

DEFAULT_SERVER = "127.0.0.1:50051"
CHUNK_BYTES = 512 * KIB
PAGE_SIZE = 1000
# Seconds between the tries of an upload whose connection broke: a server's restart fits in.
RETRY_DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# What a next try may be spared: the server made room, was not heard from, or lost what it had.
_TRY_AGAIN = (
    Reason.UPLOAD_INCOMPLETE,
    Reason.STAGING_FULL,
    Reason.TOO_MANY_TRANSFERS,
    Reason.TRANSFER_IDLE,
)
# A vanished server is noticed within 40 s; long outputs with logprobs are large messages.
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 256 * MIB),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

ERRORS = {code: kind for kind, code in CODES.items()}

Progress = Callable[[int, int], None]
LeftOut = Callable[[Sequence[str]], None]


class Client:
    """One channel to a server. Thread-safe; close it or use it as a context manager.

    timeout: seconds, the gRPC deadline of a call; None waits as long as it takes.
    """

    def __init__(self, server: str = DEFAULT_SERVER) -> None:
        self._server = server
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
        self.close()

    def close(self) -> None:
        """Ends running calls too."""
        self._channel.close()

    def generate(
        self, request: GenerateRequest, *, timeout: float | None = None
    ) -> GenerateResponse:
        """The whole reply at once."""
        with self._errors():
            reply: GenerateResponse = self._generation.Generate(request, timeout=timeout)
        return reply

    def stream(
        self, request: GenerateRequest, *, timeout: float | None = None
    ) -> Iterator[generation_pb2.GenerateStreamResponse]:
        """The reply as it is made, its last message with `final`. Closing the iterator cancels."""
        call = self._generation.GenerateStream(request, timeout=timeout)
        return self._parts(call)

    def tokenize(self, request: TokenizeRequest, *, timeout: float | None = None) -> list[int]:
        """The token ids that Generate would run."""
        with self._errors():
            return list(self._generation.Tokenize(request, timeout=timeout).token_ids)

    def model_info(self, *, timeout: float | None = None) -> generation_pb2.GetModelInfoResponse:
        """What the server serves, and its limits."""
        with self._errors():
            reply: generation_pb2.GetModelInfoResponse = self._generation.GetModelInfo(
                generation_pb2.GetModelInfoRequest(), timeout=timeout
            )
        return reply

    def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """One adapter; `id@sha256:...` names a revision. Raises NotFoundError."""
        with self._errors():
            reply: Adapter = self._adapters.GetAdapter(
                adapters_pb2.GetAdapterRequest(id=adapter_id), timeout=timeout
            )
        return reply

    def list_adapters(self, prefix: str = "", *, timeout: float | None = None) -> list[Adapter]:
        """All adapters whose id starts with prefix, by id; timeout counts per page."""
        adapters: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, id_prefix=prefix)
        with self._errors():
            while True:
                page = self._adapters.ListAdapters(request, timeout=timeout)
                adapters.extend(page.adapters)
                if not page.next_page_token:
                    return adapters
                request.page_token = page.next_page_token

    def delete_adapter(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """Raises NotFoundError."""
        with self._errors():
            self._adapters.DeleteAdapter(
                adapters_pb2.DeleteAdapterRequest(id=adapter_id), timeout=timeout
            )

    def list_revisions(self, adapter_id: str, *, timeout: float | None = None) -> list[Adapter]:
        """An id's revisions, newest first. Raises NotFoundError."""
        with self._errors():
            reply = self._adapters.ListRevisions(
                adapters_pb2.ListRevisionsRequest(id=adapter_id), timeout=timeout
            )
        return list(reply.revisions)

    def rollback(self, adapter_id: str, digest: str, *, timeout: float | None = None) -> Adapter:
        """Makes an earlier revision's content the newest one; 8 digits of its digest may do.

        Raises NotFoundError.
        """
        with self._errors():
            reply: Adapter = self._adapters.RollbackAdapter(
                adapters_pb2.RollbackAdapterRequest(id=adapter_id, digest=digest), timeout=timeout
            )
        return reply

    def prune_revisions(
        self, adapter_id: str = "", *, keep: int | None = None, timeout: float | None = None
    ) -> adapters_pb2.PruneRevisionsResponse:
        """Removes an id's old revisions, or "" for every id's, and the bytes only they needed.

        keep: how many stay of each; None: as many as the server keeps anyway. Raises NotFoundError.
        """
        request = adapters_pb2.PruneRevisionsRequest(id=adapter_id, keep=keep)
        with self._errors():
            reply: adapters_pb2.PruneRevisionsResponse = self._adapters.PruneRevisions(
                request, timeout=timeout
            )
        return reply

    def disk_usage(self, *, timeout: float | None = None) -> tuple[int, int]:
        """Bytes on the server's disk: of all adapters and revisions, and of unfinished uploads."""
        request = adapters_pb2.ListAdaptersRequest(page_size=1)
        with self._errors():
            page = self._adapters.ListAdapters(request, timeout=timeout)
        return page.stored_bytes, page.staging_bytes

    def load(self, adapter_id: str, *, pin: bool = False, timeout: float | None = None) -> Adapter:
        """Brings an adapter onto the device and waits until it is there. pin: until `unload`.

        Raises FailedPreconditionError if it can never fit, ResourceExhaustedError naming the pinned
        adapters that are in its way.
        """
        with self._errors():
            reply: Adapter = self._adapters.LoadAdapter(
                adapters_pb2.LoadAdapterRequest(id=adapter_id, pin=pin), timeout=timeout
            )
        return reply

    def unload(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """Takes an adapter's pin and its copies in memory; running requests keep theirs."""
        with self._errors():
            reply: Adapter = self._adapters.UnloadAdapter(
                adapters_pb2.UnloadAdapterRequest(id=adapter_id), timeout=timeout
            )
        return reply

    def set_default_medusa(
        self, medusa_id: str, *, timeout: float | None = None
    ) -> adapters_pb2.SetDefaultMedusaResponse:
        """Heads for requests that name none, kept across restarts; "": no heads.

        Raises FailedPreconditionError if the server was started with --medusa.
        """
        with self._errors():
            reply: adapters_pb2.SetDefaultMedusaResponse = self._adapters.SetDefaultMedusa(
                adapters_pb2.SetDefaultMedusaRequest(medusa_id=medusa_id), timeout=timeout
            )
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

        When the connection breaks, the server has no room for now, or a deletion takes what it
        counted on, it tries again after RETRY_DELAYS, from the bytes that arrived.
        if_digest: "" wants the id to be new, a digest wants it to point there, None replaces; after
        a lost answer this may refuse an upload that has succeeded. accept_base: although its config
        names another base model. progress: called with (bytes there, bytes in all). left_out:
        called with the names of what is not part of the adapter and stays here: checkpoints,
        optimizer states and other pickles, logs, hidden files. Raises InvalidArgumentError for a
        folder without weights that may be sent, and what the server raises.
        """
        paths, others = adapter_files(folder)
        if others and left_out is not None:
            left_out(others)
        specs = [_file_spec(path) for path in paths]
        header = adapters_pb2.UploadHeader(
            id=adapter_id, files=specs, if_digest=if_digest, accept_base=accept_base
        )
        by_sha256 = {spec.sha256: path for spec, path in zip(specs, paths, strict=True)}
        planned = False
        for delay in (*RETRY_DELAYS, None):
            try:
                with self._errors():
                    request = adapters_pb2.PlanUploadRequest(id=adapter_id, files=specs)
                    plan = self._adapters.PlanUpload(request)
                    planned = True
                    needed = [(by_sha256[blob.sha256], blob) for blob in plan.needed]
                    reply: Adapter = self._adapters.UploadAdapter(_upload(header, needed, progress))
                    return reply
            except UnavailableError:
                if not planned or delay is None:  # nobody was there to begin with, or comes back
                    raise
            except (AbortedError, ResourceExhaustedError) as error:
                if error.reason not in _TRY_AGAIN or delay is None:
                    raise
            time.sleep(delay)
        raise AssertionError("the last try returns or raises")

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

        One of hub_id (organisation/name, at a revision, with a token if it is private) and folder.
        if_digest, accept_base and left_out as in `upload`; progress: called with (bytes there,
        bytes in all). Raises PermissionDeniedError if the server does not pull from there, UnavailableError if the
        hub fails, and what an upload raises.
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
            receiver, received = Receiver(staged), 0
            for reply in self._parts(self._adapters.DownloadAdapter(request)):
                if reply.WhichOneof("part") == "file":
                    receiver.begin(reply.file.name, reply.file.size, reply.file.sha256)
                else:
                    receiver.write(reply.data)
                    received += len(reply.data)
                if progress is not None:
                    progress(received, adapter.size_bytes)
            receiver.end()
        return adapter

    def _parts(self, call: Any) -> Iterator[Any]:
        """A server stream's messages; the call ends with the iterator."""
        try:
            with self._errors():
                yield from call
        finally:
            call.cancel()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise to_error(error, self._server) from None


def to_error(error: grpc.RpcError, server: str) -> LorastackError:
    """Our class for a failed call; reason and metadata are the server's where it sent them."""
    call = cast(grpc.Call, error)
    code, details = call.code(), call.details() or ""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(call)
    for detail in status.details if status is not None else ():
        _ = detail.Unpack(info) or detail.Unpack(retry)
    if code is grpc.StatusCode.UNAVAILABLE and not info.reason:
        details = (
            f"no answer from {server} ({details}); start one with `lorastack serve` or name "
            "another with --server"
        )
    ours = ERRORS.get(code, InternalError)(details or code.name)
    ours.metadata.update(info.metadata)
    if info.reason in Reason.__members__:
        ours.reason = Reason[info.reason]
    if isinstance(ours, ResourceExhaustedError) and retry.HasField("retry_delay"):
        ours.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return ours


def _file_spec(path: Path) -> adapters_pb2.FileSpec:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return adapters_pb2.FileSpec(name=path.name, size=path.stat().st_size, sha256=sha256)


def _upload(
    header: adapters_pb2.UploadHeader,
    needed: Sequence[tuple[Path, adapters_pb2.NeededBlob]],
    progress: Progress | None,
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    yield adapters_pb2.UploadAdapterRequest(header=header)
    total = sum(path.stat().st_size for path, _ in needed)
    done = sum(blob.offset for _, blob in needed)
    for path, blob in needed:
        offset = blob.offset
        with path.open("rb") as file:
            file.seek(offset)
            while data := file.read(CHUNK_BYTES):
                chunk = adapters_pb2.UploadChunk(sha256=blob.sha256, offset=offset, data=data)
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                offset += len(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
