"""A checkpoint holds every bit, is replaced as a whole, and belongs to one run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorastack.adapters.store import durable
from lorastack.errors import DataLossError, FailedPreconditionError, ResourceExhaustedError
from lorastack.train.checkpoint import load_checkpoint, save_checkpoint

RUN = {"seed": 1, "rate": 0.1, "shape": (1, 2)}


def test_every_bit_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "checkpoint.safetensors"
    assert load_checkpoint(path, RUN) is None
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(5.0), "c": torch.randn(2).double()}
    state = {"step": 3, "loss": [0.1 + 0.2, float("nan")], "epoch": None}
    save_checkpoint(path, RUN, state, tensors)
    found = load_checkpoint(path, RUN)
    assert found is not None
    assert found[0]["loss"][0] == 0.1 + 0.2 and found[0]["loss"][1] != found[0]["loss"][1]
    assert found[0]["step"] == 3 and found[0]["epoch"] is None
    assert found[1].keys() == tensors.keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in tensors.items())
    assert all(found[1][name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, RUN, {}, {"a": torch.zeros(1)})
    with pytest.raises(FailedPreconditionError, match=r"another seed, rate\)"):
        load_checkpoint(path, RUN | {"seed": 2, "rate": 0.2})


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(data)
    with pytest.raises(DataLossError, match="is no checkpoint"):
        load_checkpoint(path, RUN)


@pytest.mark.parametrize("text", ["[]", "{}", '{"identity": 3, "state": {}}', '{"identity": {}}'])
def test_metadata_of_another_kind_is_damage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"lorastack.training": text})
    with pytest.raises(DataLossError, match="is no checkpoint"):
        load_checkpoint(path, RUN)


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, RUN, {"step": 1}, {"a": torch.zeros(1)})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(ResourceExhaustedError, match="run the same command again"):
        save_checkpoint(path, RUN, {"step": 2}, {"a": torch.zeros(1)})
    found = load_checkpoint(path, RUN)
    assert found is not None and found[0] == {"step": 1}
