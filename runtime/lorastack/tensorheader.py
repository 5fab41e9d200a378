"""The header of a safetensors file: one reader for adapters and models, and its writer.

Format: 8 bytes little-endian header length, the header (JSON: tensor name -> dtype, shape,
data_offsets relative to the header's end), then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

# Bytes a value, by the dtype names of safetensors; other dtypes are never read.
ITEMSIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}

Invalid = Callable[[str], Exception]  # the error for a message
ParseObject = Callable[[str, str], Mapping[str, object]]  # JSON text, what errors call it


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: `nbytes` bytes from `offset`, which counts from the file's start."""

    name: str
    path: Path
    dtype: str  # the name that safetensors gives it
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind the tensor."""
        return self.offset + self.nbytes


class Header(NamedTuple):
    """tensors: name -> fields, still to be checked by `tensor_entry`."""

    tensors: dict[str, object]
    data_start: int  # bytes from the file's start
    file_size: int  # bytes


def read_header(
    path: Path, shown: str, *, max_bytes: int, parse: ParseObject, invalid: Invalid
) -> Header:
    """The header of a file that errors call `shown`, without its metadata.

    Raises `invalid` for a truncated file, a header of more than max_bytes or one that is not UTF-8,
    and whatever `parse` raises.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise invalid(
                f"{shown} is truncated or not a safetensors file: its header does not fit its "
                f"{size} bytes"
            )
        if length > max_bytes:
            raise invalid(f"{shown} has a header of {length} bytes; at most {max_bytes} are read")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the header of {shown} is not UTF-8") from error
    tensors = dict(parse(text, f"the header of {shown}"))
    tensors.pop("__metadata__", None)
    return Header(tensors, 8 + length, size)


def tensor_entry(
    path: Path, shown: str, name: str, fields: object, data_start: int, invalid: Invalid
) -> TensorEntry:
    """One tensor of a header. Where its bytes lie in the file is for the caller to check.

    Raises `invalid` for fields that are missing or malformed, or disagree about a known dtype's
    number of bytes.
    """
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets)):
        raise invalid(f"{shown}: tensor {name} has a malformed dtype, shape or data_offsets")
    if len(offsets) != 2:
        raise invalid(f"{shown}: tensor {name} has {len(offsets)} data_offsets, not 2")
    nbytes = offsets[1] - offsets[0]
    if dtype in ITEMSIZES and (needed := math.prod(shape) * ITEMSIZES[dtype]) != nbytes:
        raise invalid(
            f"{shown}: tensor {name} of shape {shape} and dtype {dtype} needs {needed} bytes, "
            f"but its data_offsets are {offsets}"
        )
    return TensorEntry(
        name=name,
        path=path,
        dtype=dtype,
        shape=tuple(shape),
        offset=data_start + offsets[0],
        nbytes=nbytes,
    )


def header_bytes(tensors: Iterable[TensorEntry]) -> bytes:
    """The header of a file that holds these tensors one after the other, length included."""
    table: dict[str, object] = {}
    end = 0
    for entry in tensors:
        start, end = end, end + entry.nbytes
        offsets = [start, end]
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def _naturals(value: object) -> TypeGuard[list[int]]:
    """True for a short list of plain non-negative integers below 2**48."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )
