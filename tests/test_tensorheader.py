"""Adapters and models read headers with the same code, each with limits and errors of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from lorastack.adapters.formats import tensorfile
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.model.checkpoint import Checkpoint
from lorastack.tensorheader import TensorEntry, header_bytes

NAME = "model.safetensors"
Read = Callable[[Path], Mapping[str, TensorEntry]]
READERS: dict[Reason, Read] = {
    Reason.INVALID_ADAPTER: lambda folder: tensorfile.read_header(folder / NAME, NAME),
    Reason.INVALID_MODEL: lambda folder: Checkpoint(folder).tensors,
}
GOOD = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}


def write(folder: Path, header: bytes) -> None:
    (folder / NAME).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_both_find_the_same_tensors(tmp_path: Path, read: Read) -> None:
    write(tmp_path, json.dumps({"__metadata__": {"format": "pt"}, "a": GOOD}).encode())
    offset = (tmp_path / NAME).stat().st_size - 8
    entry = TensorEntry(
        name="a", path=tmp_path / NAME, dtype="F16", shape=(4,), offset=offset, nbytes=8
    )
    assert dict(read(tmp_path)) == {"a": entry}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"shape": [5]}, r"tensor a of shape \[5\] and dtype F16 needs 10 bytes"),
        ({"data_offsets": [8, 0]}, "tensor a of shape"),
        ({"data_offsets": [0, 4, 8]}, "tensor a has 3 data_offsets, not 2"),
        *(({"shape": shape}, "tensor a has a malformed") for shape in (4, [4.0], [True], ["4"])),
        ({"data_offsets": [-8, 0]}, "tensor a has a malformed"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("reason", "read"), READERS.items(), ids=READERS)
def test_both_refuse_a_tensor_that_lies(
    tmp_path: Path, reason: Reason, read: Read, fields: dict[str, Any], named: str
) -> None:
    write(tmp_path, json.dumps({"a": GOOD | fields}).encode())
    with pytest.raises(InvalidArgumentError, match=named) as refusal:
        read(tmp_path)
    assert refusal.value.reason is reason


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\1", f"{NAME} is truncated or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", f"{NAME} is truncated or not"),
        (b"\2\0\0\0\0\0\0\0\xff\xff", f"the header of .*{NAME} is not UTF-8"),
        (b"\2\0\0\0\0\0\0\0[]", "JSON object"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("reason", "read"), READERS.items(), ids=READERS)
def test_both_refuse_what_is_no_header(
    tmp_path: Path, reason: Reason, read: Read, content: bytes, named: str
) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=named) as refusal:
        read(tmp_path)
    assert refusal.value.reason is reason


def test_a_written_header_is_read_by_safetensors(tmp_path: Path) -> None:
    """Whatever order the tensors had where they come from."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5).bfloat16()}
    save_file(tensors, tmp_path / NAME)
    entries = sorted(Checkpoint(tmp_path).tensors.values(), key=lambda entry: entry.name)
    data = (tmp_path / NAME).read_bytes()
    written = header_bytes(entries) + b"".join(data[e.offset : e.end] for e in entries)
    for name, tensor in load(written).items():
        assert tensor.dtype is tensors[name].dtype and torch.equal(tensor, tensors[name])
