"""Safetensors headers that lie, and values that are not numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lorastack.adapters.formats.jsonfile import MAX_OBJECTS
from lorastack.adapters.formats.tensorfile import (
    MAX_HEADER,
    MAX_TENSORS,
    PIECE,
    check_finite,
    pieces,
    read_header,
)
from lorastack.errors import InvalidArgumentError
from lorastack.tensorheader import TensorEntry

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: int | bytes = 32, raw: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if raw is None else raw
    body = bytes(data) if isinstance(data, int) else data
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def read_bytes(entry: TensorEntry) -> npt.NDArray[np.uint8]:
    return np.concatenate([piece.copy() for piece in pieces(entry)])


def changed(**fields: Any) -> dict[str, Any]:
    return GOOD | {"b": GOOD["b"] | fields}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(5, 7),
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 2, 2).bfloat16(),
        "double": torch.randn(1, 4).double(),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    entries = read_header(path, path.name)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entries[name].shape == tuple(tensor.shape)
        data = torch.from_numpy(read_bytes(entries[name])).view(tensor.dtype)
        assert torch.equal(data.reshape(tensor.shape), tensor)
        check_finite(entries[name])


LIES: dict[str, tuple[Any, int, str]] = {
    "too little data": (GOOD, 31, "its header describes"),
    "too much data": (GOOD, 33, "its header describes"),
    "offsets against shape": (changed(shape=[5]), 32, "b of shape .*needs 10 bytes"),
    "overlap": (changed(data_offsets=[20, 28]), 28, "b overlaps"),
    "same place": (changed(data_offsets=[0, 8]), 24, "overlaps"),
    "gap": (changed(data_offsets=[28, 36]), 36, "b overlaps another one or follows a gap"),
    "backwards": (changed(data_offsets=[32, 24]), 32, "b of shape"),
    "negative": (changed(data_offsets=[-8, 0]), 32, "b has a malformed"),
    "huge": (changed(shape=[1 << 60]), 32, "b has a malformed"),
    "fraction": (changed(shape=[4.0]), 32, "b has a malformed"),
    "boolean": (changed(shape=[True, 4]), 32, "b has a malformed"),
    "no shape": (GOOD | {"b": {"dtype": "F16", "data_offsets": [24, 32]}}, 32, "b must have"),
    "extra field": (changed(more=1), 32, "b must have exactly"),
    "integers": (changed(dtype="I64", shape=[1]), 32, "b has dtype I64"),
    "no dtype": (changed(dtype=None), 32, "b has dtype"),
    "float8": (changed(dtype="F8_E4M3", shape=[8]), 32, "F8_E4M3"),
    "not a table": (GOOD | {"b": 3}, 32, "b must have"),
    "list": ([GOOD], 32, "JSON object"),
    "long name": ({"n" * 300: GOOD["a"]}, 24, "longer than"),
}


@pytest.mark.parametrize(("header", "data", "named"), LIES.values(), ids=LIES.keys())
def test_lies_are_refused_by_name(tmp_path: Path, header: Any, data: int, named: str) -> None:
    path = write(tmp_path / "x", header, data)
    with pytest.raises(InvalidArgumentError, match=named):
        read_header(path, "x")


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "JSON"),
        (b" " * (MAX_HEADER + 1), "at most"),
        (b'{"a": [' + b"{}," * MAX_OBJECTS + b"{}]}", "more than"),
    ],
    ids=["empty", "latin", "twice", "nan", "deep", "digits", "huge", "objects"],
)
def test_headers_that_are_not_json(tmp_path: Path, raw: bytes, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        read_header(write(tmp_path / "x", None, 0, raw), "x")


def test_many_tensors(tmp_path: Path) -> None:
    header = {str(i): {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(4097)}
    with pytest.raises(InvalidArgumentError, match=f"4097 tensors; at most {MAX_TENSORS}"):
        read_header(write(tmp_path / "x", header, 0), "x")
    del header["0"]
    assert len(read_header(write(tmp_path / "x", header, 0), "x")) == MAX_TENSORS


@pytest.mark.parametrize("size", [0, 3, 8, 40, 100])
def test_truncation(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "x", GOOD)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InvalidArgumentError, match="truncated"):
        read_header(path, "x")


@given(data=st.data())
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed, cut or added anywhere: InvalidArgumentError, or a table that fits the file."""
    path = tmp_path_factory.mktemp("fuzz") / "x"
    whole = bytearray(write(path, GOOD).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(whole)
    try:
        entries = read_header(path, "x")
    except InvalidArgumentError:
        return
    for entry in entries.values():
        assert entry.offset + entry.nbytes <= len(whole)
        assert len(read_bytes(entry)) == entry.nbytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("place", [0, PIECE // 2 + 3, -1])
def test_values_that_are_no_numbers(
    tmp_path: Path, dtype: torch.dtype, value: float, place: int
) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    tensor = torch.full((PIECE + 5,), largest, dtype=dtype)
    path = tmp_path / "x"
    path.write_bytes(save({"good": tensor}))
    check_finite(read_header(path, "x")["good"])
    tensor[place] = value
    path.write_bytes(save({"bad": tensor}))
    with pytest.raises(InvalidArgumentError, match="bad contains NaN"):
        check_finite(read_header(path, "x")["bad"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.floats(min_value=3.40282e38, max_value=3.40283e38) | st.floats())
def test_float64_must_fit_in_float32(tmp_path: Path, value: float) -> None:
    tensor = torch.tensor([value], dtype=torch.float64)
    path = tmp_path / "x"
    path.write_bytes(save({"a": tensor}))
    entry = read_header(path, "x")["a"]
    if tensor.float().isfinite():
        check_finite(entry)
    else:
        with pytest.raises(InvalidArgumentError, match="more than float32 holds"):
            check_finite(entry)


def test_pieces_are_whole_values_and_writable(tmp_path: Path) -> None:
    """torch warns about, and may write through, arrays that are not writable."""
    tensor = torch.arange(PIECE + 3, dtype=torch.float64)
    path = tmp_path / "x"
    path.write_bytes(save({"a": tensor}))
    entry = read_header(path, "x")["a"]
    assert all(len(piece) % 8 == 0 and piece.flags.writeable for piece in pieces(entry))
    assert np.array_equal(read_bytes(entry).view(np.float64), tensor.numpy())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidArgumentError, match="a is cut short"):
        list(pieces(entry))
