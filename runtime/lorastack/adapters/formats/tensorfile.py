"""Safetensors files of adapters: false headers, and values that are not finite, are refused.

The tensors' bytes must follow each other without gaps or overlaps, up to the file's end. No torch
here: folders are parsed without it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorastack import tensorheader
from lorastack.adapters.formats.jsonfile import parse_object
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.tensorheader import TensorEntry

# A LoRA on every projection of 126 layers has 1,764 tensors in a header of 250 KB. Headers are
# parsed by Python, which holds up the step: 4,096 tensors take it 20 ms.
MAX_HEADER = 1 << 20  # bytes
MAX_TENSORS = 4096
MAX_NAME = 256  # characters of a tensor's name
# Bytes that are read at once: few enough for the processor's cache, and for torch to start no
# OpenMP threads; enough that Python's own time does not matter.
PIECE = 1 << 16

# How to find bad values by dtype: the mask of all bits but the sign's, and the smallest masked
# value that is an infinity or NaN. For F64, the smallest that becomes infinite in float32, the
# widest dtype that is computed with.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x47EF_FFFF_F000_0000),
}
FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = ("I32", "I64")


def read_header(path: Path, name: str, dtypes: Collection[str] = FLOATS) -> dict[str, TensorEntry]:
    """Tensors of a safetensors file by name; `name` is what errors call the file.

    dtypes: the accepted ones. Raises InvalidArgumentError for a truncated file, a header that
    is too large or malformed, too many tensors, offsets that overlap, leave gaps or disagree with
    the shapes, and other dtypes.
    """
    header = tensorheader.read_header(
        path, name, max_bytes=MAX_HEADER, parse=parse_object, invalid=invalid
    )
    if len(header.tensors) > MAX_TENSORS:
        raise invalid(f"{name} has {len(header.tensors)} tensors; at most {MAX_TENSORS} are read")
    entries = []
    for tensor, fields in header.tensors.items():
        _check_fields(name, tensor, fields, dtypes)
        entries.append(
            tensorheader.tensor_entry(path, name, tensor, fields, header.data_start, invalid)
        )
    position = header.data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise invalid(f"{name}: tensor {entry.name} overlaps another one or follows a gap")
        position = entry.end
    if position != header.file_size:
        raise invalid(f"{name} has {header.file_size} bytes, but its header describes {position}")
    return {entry.name: entry for entry in entries}


def _check_fields(file: str, name: str, fields: object, dtypes: Collection[str]) -> None:
    """What is refused of a tensor beyond what `tensor_entry` checks."""
    if len(name) > MAX_NAME:
        raise invalid(f"{file}: tensor name {name[:64]}... is longer than {MAX_NAME} characters")
    if not name.isprintable():
        raise invalid(f"{file}: tensor name {name[:64]!r} holds what cannot be printed")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise invalid(f"{file}: tensor {name} must have exactly dtype, shape and data_offsets")
    if (dtype := fields["dtype"]) not in dtypes:
        known = ", ".join(dtypes)
        raise unsupported(f"{file}: tensor {name} has dtype {str(dtype)[:16]}, not {known}")


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
