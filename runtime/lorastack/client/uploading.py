"""What an upload sends, and how it goes on after a broken connection."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorastack.client.calls import Progress, our_errors
from lorastack.config import KIB
from lorastack.errors import (
    AbortedError,
    InternalError,
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.folders import choose
from lorastack.v1 import adapters_pb2

CHUNK_BYTES = 512 * KIB
# Seconds before each further try of an upload; a server's restart fits in.
RETRY_DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Refusals that pass: the server makes room, heard nothing for too long, or lost bytes it had.
_TRY_AGAIN = (
    Reason.UPLOAD_INCOMPLETE,
    Reason.STAGING_FULL,
    Reason.TOO_MANY_TRANSFERS,
    Reason.TRANSFER_IDLE,
)


def adapter_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that an upload of a folder sends, sorted by name, and the names it leaves out.

    Raises InvalidArgumentError if the folder holds no adapter.
    """
    chosen = choose(_names(folder), str(folder), lambda name: _names(folder / name))
    paths = [folder / name for name in chosen.files]
    for path in paths:
        if not path.is_file():  # a pipe would never end
            raise InvalidArgumentError(f"{path} is not a regular file: take it out of the folder")
    return paths, list(chosen.left_out)


def folder_files(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones, sorted by name. Raises InvalidArgumentError."""
    paths = [folder / name for name in _names(folder) if not name.startswith(".")]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InvalidArgumentError(f"{folder} holds no files; name the folder of an adapter")
    return sorted(paths)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is not a folder; name the one that holds the adapter")
    return [f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()]


def file_spec(path: Path) -> adapters_pb2.FileSpec:
    """A file as an upload announces it: name, size in bytes, sha256."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return adapters_pb2.FileSpec(name=path.name, size=path.stat().st_size, sha256=sha256)


def send_files(
    adapters: Any,
    server: str,
    header: adapters_pb2.UploadHeader,
    paths: Sequence[Path],
    progress: Progress | None,
) -> adapters_pb2.Adapter:
    """Sends what the server lacks of the files of `header`, trying again after RETRY_DELAYS.

    adapters: the AdapterService's stub; paths: in the order of the header's files. Raises the
    error of the last try; InternalError if the server asks for anything else.
    """
    by_sha256 = {spec.sha256: path for spec, path in zip(header.files, paths, strict=True)}
    planned = False
    for delay in (*RETRY_DELAYS, None):
        try:
            with our_errors(server):
                request = adapters_pb2.PlanUploadRequest(id=header.id, files=header.files)
                plan = adapters.PlanUpload(request)
                planned = True
                needed = [(_path(by_sha256, blob, server), blob) for blob in plan.needed]
                reply: adapters_pb2.Adapter = adapters.UploadAdapter(
                    upload_messages(header, needed, progress)
                )
                return reply
        except UnavailableError:
            if not planned or delay is None:  # there was no server, or it does not come back
                raise
        except (AbortedError, ResourceExhaustedError) as error:
            if error.reason not in _TRY_AGAIN or delay is None:
                raise
        time.sleep(delay)
    raise AssertionError("the last try returns or raises")


def _path(by_sha256: Mapping[str, Path], blob: adapters_pb2.NeededBlob, server: str) -> Path:
    if (path := by_sha256.get(blob.sha256)) is None:
        raise InternalError(
            f"{server} asks for the blob {blob.sha256[:80]!r}, which the upload does not hold: the "
            "server is faulty, or something between changes its answers"
        )
    return path


def upload_messages(
    header: adapters_pb2.UploadHeader,
    needed: Sequence[tuple[Path, adapters_pb2.NeededBlob]],
    progress: Progress | None,
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Yields the header, then each needed file from the offset that the server already has."""
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
