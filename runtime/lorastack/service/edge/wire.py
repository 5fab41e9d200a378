"""From the bytes of a request to its message, with every length checked before anything is built.

protobuf makes an object of each entry of a list as it parses, so a message of a few megabytes may
hold millions. The bytes are walked first, field by field, and the walk ends where a list is longer
than it may be: what is refused costs no more than what is allowed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.service.edge.limits import Lengths, too_long

MAX_RECORDS = 8192  # fields and entries of lists in one message, a packed list counting as one
MAX_SINGLE = 128  # of these, unknown fields, and those outside lists, which a message has once
SKIPPED = 512  # bytes: shorter requests, and shorter entries without lists, are not walked
GZIP = b"\x1f\x8b"  # no message begins like this: field 3 of a wire type that does not exist
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CONTINUED = bytes(range(0x80, 0x100))  # bytes of a varint that are not its last

Longest = Callable[[str], int]  # by a list's path: "chat.messages"


@dataclass(frozen=True, slots=True)
class _Field:
    """path: dotted names from the message down. longest: of a list; None: not a list.

    single: neither a list nor in one. inner: the fields of a message; None: a plain value.
    """

    path: str
    longest: int | None
    single: bool
    inner: _Fields | None
    packable: bool


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a message by number. skipped: up to so many bytes are not walked."""

    fields: Mapping[int, _Field]
    skipped: int


class RequestReader:
    """Reads one kind of message."""

    def __init__(self, descriptor: Descriptor, lengths: Lengths) -> None:
        """Raises KeyError for a list that `lengths` does not bound."""
        self._max_bytes = lengths.request_bytes(descriptor.name)
        self._class: type[Message] = GetMessageClass(descriptor)
        self._fields = _fields(descriptor, lengths.longest).fields

    def read(self, raw: bytes) -> Any:
        """Parses a message, gzipped or not. Raises InvalidArgumentError and nothing else."""
        if raw.startswith(GZIP):
            raw = self._unzip(raw)
        if len(raw) > self._max_bytes:
            raise self._too_large()
        if len(raw) > SKIPPED:
            _Walk().message(raw, 0, len(raw), self._fields)
        try:
            return self._class.FromString(raw)
        except DecodeError:
            raise self._malformed() from None

    def _unzip(self, raw: bytes) -> bytes:
        """The unzipped bytes. It stops at the bound, whatever the rest would become."""
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            data = unzip.decompress(raw, self._max_bytes + 1)
        except zlib.error:
            raise self._malformed() from None
        if len(data) > self._max_bytes:
            raise self._too_large()
        if not unzip.eof:
            raise self._malformed()
        return data

    def _too_large(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"a {self._class.DESCRIPTOR.name} takes at most {self._max_bytes} bytes; send less",
            reason=Reason.REQUEST_TOO_LARGE,
        )

    def _malformed(self) -> InvalidArgumentError:
        return malformed(self._class.DESCRIPTOR.name)


def request_readers(files: Iterable[FileDescriptor], lengths: Lengths) -> dict[str, RequestReader]:
    """A reader for every method of every service in these files, by its full name."""
    return {
        f"/{service.full_name}/{method.name}": RequestReader(method.input_type, lengths)
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


def malformed(name: str) -> InvalidArgumentError:
    """The error for bytes that are no message. name: the message's, for people."""
    return InvalidArgumentError(f"the bytes are not a {name}; is the client of another version?")


def _fields(
    descriptor: Descriptor, longest: Longest, parent: str = "", single: bool = True
) -> _Fields:
    fields = {}
    for field in descriptor.fields:
        path, inner = f"{parent}{field.name}", field.message_type
        alone = single and not field.is_repeated
        fields[field.number] = _Field(
            path=path,
            longest=longest(path) if field.is_repeated else None,
            single=alone,
            inner=None if inner is None else _fields(inner, longest, f"{path}.", alone),
            packable=field.is_repeated and field.cpp_type in _INTEGERS,
        )
    plain = all(field.inner is None and field.longest is None for field in fields.values())
    return _Fields(fields, SKIPPED if plain else 0)


_INTEGERS = (
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_BOOL,
    FieldDescriptor.CPPTYPE_ENUM,
)


class _Walk:
    """One pass over the wire format; see protobuf's "Encoding"."""

    def __init__(self) -> None:
        self._num_records = 0
        self._num_single = 0
        self._lengths: Counter[str] = Counter()

    def message(self, raw: bytes, at: int, end: int, fields: Mapping[int, _Field]) -> None:
        """Raises InvalidArgumentError for bytes that are no message or hold too much."""
        while at < end:
            tag, at = _varint(raw, at, end)
            kind, start = tag & 7, at
            if kind == _BYTES:
                size, start = _varint(raw, at, end)
                at = start + size
            elif kind == _VARINT:
                _, at = _varint(raw, at, end)
            elif kind == _FIXED32:
                at += 4
            elif kind == _FIXED64:
                at += 8
            else:  # groups, which no message of ours has, and what does not exist
                raise malformed("message")
            if at > end:
                raise malformed("message")
            field = fields.get(tag >> 3)
            self._count(field)
            if field is None:
                continue
            if field.longest is not None:
                packed = field.packable and kind == _BYTES
                self._extend(field.path, field.longest, raw[start:at] if packed else None)
            if field.inner is not None and kind == _BYTES and at - start > field.inner.skipped:
                self.message(raw, start, at, field.inner.fields)

    def _count(self, field: _Field | None) -> None:
        """Counts one more field or entry. Raises InvalidArgumentError for too many."""
        self._num_records += 1
        self._num_single += field is None or field.single
        if self._num_records > MAX_RECORDS or self._num_single > MAX_SINGLE:
            raise InvalidArgumentError(
                f"a request holds at most {MAX_RECORDS} fields and entries, {MAX_SINGLE} of them "
                "outside lists; send fewer",
                reason=Reason.REQUEST_TOO_LARGE,
            )

    def _extend(self, path: str, longest: int, packed: bytes | None) -> None:
        """Counts one more entry, or all of a packed list."""
        count = 1 if packed is None else len(packed.translate(None, _CONTINUED))
        self._lengths[path] += count
        if self._lengths[path] > longest:
            raise too_long(path, longest)


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends."""
    if at < end and raw[at] < 0x80:
        return raw[at], at + 1
    value = shift = 0
    while at < end and shift < 70:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise malformed("message")
