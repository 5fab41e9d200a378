"""gRPC calls by hand over HTTP/2: whatever a client of ours would not send."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING = 0, 1, 3, 4, 6
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PATIENCE = 30.0  # seconds until a wait for something that must happen gives up


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def enveloped(message: bytes, *, compressed: bool = False) -> bytes:
    """A message as gRPC frames it."""
    return struct.pack(">BI", compressed, len(message)) + message


class RawConnection:
    """Sends what it is told and, unless asked to `read`, never looks at what comes back.

    window: bytes of a stream that the server may send before it has to wait.
    """

    def __init__(self, address: str, window: int = 65_535) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), PATIENCE)
        self._stream = -1
        self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def call(
        self,
        path: str | bytes,
        body: bytes = b"",
        *,
        end: bool = True,
        headers: Iterable[tuple[str, str]] = (),
    ) -> int:
        """Opens a call and sends a body (see `enveloped`); the stream's number."""
        self._stream += 2
        fields: list[tuple[str, str | bytes]] = [
            *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")),
            *(("te", "trailers"), ("content-type", "application/grpc"), *headers),
        ]
        block = b"".join(_literal(name, value) for name, value in fields)
        flags = END_HEADERS | (END_STREAM if end and not body else 0)
        self.send(frame(HEADERS, flags, self._stream, block))
        for at in range(0, len(body), 16_000):
            last = at + 16_000 >= len(body)
            piece = body[at : at + 16_000]
            self.send(frame(DATA, END_STREAM if last and end else 0, self._stream, piece))
        return self._stream

    def reset(self, stream: int) -> None:
        """The caller gives up."""
        self.send(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))

    def read_until(self, word: bytes) -> bytes:
        """What came, up to a word of it; fails when the connection ends before."""
        got = b""
        while word not in got:
            data = self._socket.recv(1 << 16)
            assert data, f"the server hung up: {got[-300:]!r}"
            got += data
        return got


def _literal(name: str, value: str | bytes) -> bytes:
    """A header that HPACK neither compresses nor keeps."""
    return (
        b"\0"
        + _string(name.encode())
        + _string(value.encode() if isinstance(value, str) else value)
    )


def _string(raw: bytes) -> bytes:
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    rest, out = len(raw) - 127, bytearray([127])
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes((*out, rest)) + raw
