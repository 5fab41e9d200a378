"""The files that a Medusa-2 checkpoint's heads make."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from lorastack.adapters.sources.base import SourceFile
from lorastack.model.checkpoint import Checkpoint
from lorastack.startup.own_heads import own_heads

HEADS = {
    "0.0.linear.weight": torch.arange(16.0).view(4, 4),
    "0.0.linear.bias": torch.arange(4.0),
    "0.1.weight": torch.arange(40.0).view(10, 4).bfloat16(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other tensors lie before and between the heads'."""
    found = tmp_path_factory.mktemp("checkpoint")
    tensors = {f"medusa_head.{name}": tensor for name, tensor in HEADS.items()}
    save_file({"a": torch.ones(3), "z": torch.ones(3)} | tensors, found / "model.safetensors")
    fields = {"medusa_num_heads": 1, "medusa_num_layers": 1, "hidden_size": 4}
    (found / "config.json").write_text(json.dumps(fields))
    return found


def files_of(folder: Path) -> list[SourceFile]:
    fields = json.loads((folder / "config.json").read_text())
    return own_heads(Checkpoint(folder), fields, "base")


def test_they_are_a_folder_as_heads_are_published_in(folder: Path) -> None:
    files = {file.spec.name: file for file in files_of(folder)}
    contents = {name: b"".join(file.read(0)) for name, file in files.items()}
    for name, file in files.items():
        assert file.spec.size == len(contents[name])
        assert file.spec.sha256 == hashlib.sha256(contents[name]).hexdigest()
    found = load(contents.pop("medusa_lm_head.safetensors"))
    assert found.keys() == HEADS.keys()
    for name, tensor in HEADS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert {name: json.loads(data) for name, data in contents.items()} == {
        "config.json": {
            "medusa_num_heads": 1,
            "medusa_num_layers": 1,
            "base_model_name_or_path": "base",
            "version": "1",
        }
    }


@given(offset=st.integers(0, 700))
def test_they_are_read_from_any_offset(folder: Path, offset: int) -> None:
    for file in files_of(folder):
        assert b"".join(file.read(offset)) == b"".join(file.read(0))[offset:]


def test_a_checkpoint_without_heads_gives_none(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert own_heads(Checkpoint(tmp_path), {}, "base") == []
