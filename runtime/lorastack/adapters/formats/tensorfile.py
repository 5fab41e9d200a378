"""Safetensors files, read by our own code so that a lying header is refused by name.

Format: 8 bytes little-endian header length, the header (JSON: tensor name -> dtype, shape,
data_offsets relative to the header's end), then the data, without gaps or overlaps. No torch here:
`lorastack adapters verify` reads folders with this module alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorastack.adapters.formats.jsonfile import parse_object
from lorastack.adapters.formats.refusal import invalid, unsupported

# A LoRA on every projection of 126 layers has 1,764 tensors in a header of 250 KB. Headers are
# parsed by Python, which holds up the step: 4,096 tensors take it 20 ms.
MAX_HEADER = 1 << 20  # bytes
MAX_TENSORS = 4096
MAX_NAME = 256  # characters of a tensor's name
# Values are read in pieces of this size: small enough for the processor's cache, and for torch not
# to bring in its OpenMP threads; large enough that what Python adds does not matter.
PIECE = 1 << 16

# How to look for bad values by dtype: all bits but the sign's, and the first of the patterns that
# are no number or an infinity; of F64, those that become one in float32, the widest we compute in.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x47EF_FFFF_F000_0000),
}
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # dtypes and their bytes a value
INTEGERS = {"I32": 4, "I64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file. offset: bytes from the file's start."""

    name: str
    path: Path
    dtype: str  # as in FLOATS or INTEGERS
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(
    path: Path, name: str, itemsizes: Mapping[str, int] = FLOATS
) -> dict[str, TensorEntry]:
    """Tensors of a safetensors file by name; `name` is what errors call the file.

    itemsizes: the dtypes that are accepted. Raises InvalidArgumentError for a truncated file, a
    header that is too large or malformed, too many tensors, offsets that overlap, leave gaps or
    disagree with the shapes, and other dtypes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise invalid(f"{name} is truncated: its header does not fit its {size} bytes")
        if length > MAX_HEADER:
            raise invalid(f"{name} has a header of {length} bytes; at most {MAX_HEADER} are read")
        raw = file.read(length)
    try:
        table = parse_object(raw.decode("utf-8"), f"the header of {name}")
    except UnicodeDecodeError as error:
        raise invalid(f"the header of {name} is not UTF-8") from error
    table.pop("__metadata__", None)
    if len(table) > MAX_TENSORS:
        raise invalid(f"{name} has {len(table)} tensors; at most {MAX_TENSORS} are read")
    entries = [
        _entry(path, name, tensor, fields, 8 + length, itemsizes)
        for tensor, fields in table.items()
    ]
    position = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise invalid(f"{name}: tensor {entry.name} overlaps another one or follows a gap")
        position += entry.nbytes
    if position != size:
        raise invalid(f"{name} has {size} bytes, but its header describes {position}")
    return {entry.name: entry for entry in entries}


def _entry(
    path: Path, file: str, name: str, fields: object, start: int, itemsizes: Mapping[str, int]
) -> TensorEntry:
    """One header entry, checked in itself. start: where the file's data begins."""
    if len(name) > MAX_NAME:
        raise invalid(f"{file}: tensor name {name[:64]}... is longer than {MAX_NAME} characters")
    if not name.isprintable():
        raise invalid(f"{file}: tensor name {name[:64]!r} holds what cannot be printed")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise invalid(f"{file}: tensor {name} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in itemsizes:
        known = ", ".join(itemsizes)
        raise unsupported(f"{file}: tensor {name} has dtype {str(dtype)[:16]}, not {known}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise invalid(f"{file}: tensor {name} has a malformed shape or data_offsets")
    nbytes = math.prod(shape) * itemsizes[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise invalid(
            f"{file}: tensor {name} of shape {list(shape)} and dtype {dtype} needs {nbytes} bytes, "
            f"but its data_offsets are {offsets}"
        )
    return TensorEntry(
        name=name,
        path=path,
        dtype=dtype,
        shape=tuple(shape),
        offset=start + offsets[0],
        nbytes=nbytes,
    )


def _naturals(value: object) -> bool:
    """A short list of plain non-negative integers below 2**48."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )


def pieces(entry: TensorEntry) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes, whole values at a time. A piece is valid until the next one.

    Raises InvalidArgumentError when the file ends early.
    """
    buffer = np.empty(min(PIECE, entry.nbytes), dtype=np.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for start in range(0, entry.nbytes, PIECE):
            piece = buffer[: entry.nbytes - start]
            if file.readinto(piece.data) != len(piece):
                raise invalid(f"tensor {entry.name} is cut short")
            yield piece


def check_finite(entry: TensorEntry) -> None:
    """Raises InvalidArgumentError naming the tensor if it holds NaN or what float32 cannot hold."""
    unsigned, magnitude, first = _NOT_FINITE[entry.dtype]
    for piece in pieces(entry):
        if bool(np.any((piece.view(unsigned) & unsigned(magnitude)) >= first)):
            raise invalid(f"tensor {entry.name} contains NaN, infinity or more than float32 holds")
