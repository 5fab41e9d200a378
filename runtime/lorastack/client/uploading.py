"""What an upload sends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lorastack.v1 import adapters_pb2

Progress = Callable[[int, int], None]


def file_spec(path: Path) -> adapters_pb2.FileSpec:
    """What a file of an upload is announced as."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return adapters_pb2.FileSpec(name=path.name, size=path.stat().st_size, sha256=sha256)


def upload_messages(
    header: adapters_pb2.UploadHeader,
    needed: Sequence[tuple[Path, adapters_pb2.NeededBlob]],
    chunk_bytes: int,
    progress: Progress | None,
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """The header, then what is needed of the files, each from the offset that the server has."""
    yield adapters_pb2.UploadAdapterRequest(header=header)
    total = sum(path.stat().st_size for path, _ in needed)
    done = sum(blob.offset for _, blob in needed)
    for path, blob in needed:
        offset = blob.offset
        with path.open("rb") as file:
            file.seek(offset)
            while data := file.read(chunk_bytes):
                chunk = adapters_pb2.UploadChunk(sha256=blob.sha256, offset=offset, data=data)
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                offset += len(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
