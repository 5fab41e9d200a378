"""Folders of heads: what an independent reader makes of ours, and we of others'."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorastack.errors import AlreadyExistsError, InvalidArgumentError, ResourceExhaustedError
from lorastack.layout import MAX_RANK, ModelShapes
from lorastack.train import folder as folders
from lorastack.train.folder import SharedHeads, load_heads, stored, write_heads
from lorastack.train.heads import MedusaHeads
from tests.adapters.folders import SHAPES, parse_folder
from tests.helpers.adapters import write_heads as write_others
from tests.train.test_heads import HIDDEN, random_heads

VOCAB = 200
BASE: ModelShapes = replace(SHAPES, hidden_size=HIDDEN, vocab_size=VOCAB)
X_PH = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(9))
LM_HEAD_VH = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(8))


def published_logits(folder: Path, x_PH: Tensor, lm_head_VH: Tensor) -> list[Tensor]:
    """[P, V] a head, as the published layouts are read elsewhere: no code of ours.

    In version 1 a head's last matrix is its output; in version 2 all heads use the base's lm_head.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    logits = []
    for head in range(config["medusa_num_heads"]):
        r_PH = x_PH
        for layer in range(config["medusa_num_layers"]):
            weight = tensors.pop(f"{head}.{layer}.linear.weight").float()
            bias = tensors.pop(f"{head}.{layer}.linear.bias").float()
            z_PH = r_PH @ weight.T + bias
            r_PH = r_PH + z_PH / (1 + torch.exp(-z_PH))
        if str(config.get("version", "1")) == "1":
            lm_head_VH = tensors.pop(f"{head}.{config['medusa_num_layers']}.weight").float()
        logits.append(r_PH @ lm_head_VH.T)
    assert not tensors
    return logits


def our_logits(heads: MedusaHeads) -> list[Tensor]:
    outputs = heads.outputs or (LM_HEAD_VH,) * heads.num_heads
    return [heads.state(X_PH, k) @ outputs[k].float().T for k in range(heads.num_heads)]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_independent_reader_computes_the_same(tmp_path: Path, num_layers: int) -> None:
    heads = random_heads(3, num_layers)
    target = tmp_path / "heads"
    write_heads(target, heads, base_model="some/base", ids_N=torch.arange(0, 192, 3))
    found = published_logits(target, X_PH, LM_HEAD_VH)
    torch.testing.assert_close(found, our_logits(stored(heads)))
    config = json.loads((target / "config.json").read_text())
    assert config == {
        "medusa_num_heads": 3,
        "medusa_num_layers": num_layers,
        "base_model_name_or_path": "some/base",
        "version": "2",
    }
    tensors = load_file(target / "medusa_lm_head.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "draft_vocabulary.safetensors",
        "medusa_lm_head.safetensors",
    ]


def test_what_is_written_is_read_again_and_taken_by_the_server(tmp_path: Path) -> None:
    heads, ids_N = random_heads(2, 2), torch.tensor([*range(0, 2 * MAX_RANK, 2), VOCAB - 1])
    target = tmp_path / "heads"
    fields = {"medusa_choices": [[0], [0, 0]]}
    write_heads(
        target, heads, base_model="b", ids_N=ids_N, fields=fields, files={"README.md": b"x"}
    )
    found = load_heads(target, BASE)
    assert found.ids_N is not None and torch.equal(found.ids_N, ids_N)
    wanted = stored(heads).learnt()
    assert found.heads.learnt().keys() == wanted.keys()
    assert all(torch.equal(found.heads.learnt()[name], wanted[name]) for name in wanted)
    parsed = parse_folder(target, BASE)
    assert parsed.draft_vocabulary == tuple(ids_N.tolist())
    assert parsed.facts.num_layers == 2
    assert json.loads((target / "config.json").read_text())["medusa_choices"] == [[0], [0, 0]]
    assert (target / "README.md").read_bytes() == b"x"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_folders_from_elsewhere_are_read(tmp_path: Path, version: int, dtype: torch.dtype) -> None:
    vocab_size = VOCAB if version == 1 else None
    folder = write_others(
        tmp_path / "theirs", HIDDEN, num_blocks=2, vocab_size=vocab_size, dtype=dtype
    )
    found = load_heads(folder, BASE)
    assert found.ids_N is None and len(found.heads.outputs) == (3 if version == 1 else 0)
    torch.testing.assert_close(our_logits(found.heads), published_logits(folder, X_PH, LM_HEAD_VH))


def test_a_private_part_names_its_shared_heads(tmp_path: Path) -> None:
    general, private = tmp_path / "general", tmp_path / "private"
    heads = random_heads(2, 2, rank=4)
    shared = random_heads(2, 2)
    write_heads(general, shared, base_model="b", ids_N=torch.arange(MAX_RANK))
    digest = hashlib.sha256((general / "medusa_lm_head.safetensors").read_bytes()).hexdigest()
    named = SharedHeads(id="heads-general", sha256=digest)
    write_heads(private, heads, base_model="b", shared=named)
    assert json.loads((private / "config.json").read_text()) == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 2,
        "base_model_name_or_path": "b",
        "version": "2",
        "shared_heads": {"id": "heads-general", "sha256": digest},
        "private_rank": 4,
    }
    assert sorted(path.name for path in private.iterdir()) == [
        "config.json",
        "medusa_lm_head.safetensors",
    ]
    tensors = load_file(private / "medusa_lm_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{head}.{layer}.linear.lora_{side}.weight": shape
        for head in range(2)
        for layer in range(2)
        for side, shape in (("A", (4, HIDDEN)), ("B", (HIDDEN, 4)))
    }
    base = load_heads(general, BASE)
    both = load_heads(private, BASE, base)
    found = both.heads
    assert both.ids_N is not None and both.ids_N.tolist() == list(range(MAX_RANK))
    write_heads(tmp_path / "own", heads, base_model="b", ids_N=torch.arange(1, 90), shared=named)
    own = load_heads(tmp_path / "own", BASE, base)
    assert own.ids_N is not None and own.ids_N.tolist() == list(range(1, 90))
    assert parse_folder(private, BASE).facts.shared_heads == named
    with pytest.raises(InvalidArgumentError, match="private part of heads-general"):
        load_heads(private, BASE)
    write_heads(tmp_path / "three", random_heads(3, 2), base_model="b")
    with pytest.raises(InvalidArgumentError, match="has 3 of 2"):
        load_heads(private, BASE, load_heads(tmp_path / "three", BASE))
    for head in range(2):
        r_PH = X_PH
        for layer, block in enumerate(base.heads.heads[head]):
            a, b = (tensors[f"{head}.{layer}.linear.lora_{s}.weight"].float() for s in "AB")
            z_PH = r_PH @ block.weight_HH.T + block.bias_H + r_PH @ a.T @ b.T
            r_PH = r_PH + z_PH * torch.sigmoid(z_PH)
        torch.testing.assert_close(found.state(X_PH, head), r_PH)


def test_a_folder_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "heads"
    target.mkdir()
    write_heads(target, random_heads(1, 1), base_model="old")  # an empty folder is none
    (target / "notes.md").write_text("kept")
    with pytest.raises(AlreadyExistsError, match="is there already"):
        write_heads(target, random_heads(1, 1), base_model="new")
    assert json.loads((target / "config.json").read_text())["base_model_name_or_path"] == "old"
    write_heads(target, random_heads(1, 1), base_model="new", replace=True)
    assert json.loads((target / "config.json").read_text())["base_model_name_or_path"] == "new"
    assert not (target / "notes.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "heads"
    write_heads(target, random_heads(1, 1), base_model="old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(ResourceExhaustedError, match="free some space"):
        write_heads(target, random_heads(1, 1), base_model="new", replace=True)
    assert json.loads((target / "config.json").read_text())["base_model_name_or_path"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_a_rename_that_fails_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "heads"
    write_heads(target, random_heads(1, 1), base_model="old")
    rename = os.rename

    def second_fails(self: Path, place: Path) -> Path:
        if self.name != "heads" and (self / "config.json").exists() and place == target:
            config = json.loads((self / "config.json").read_text())
            if config["base_model_name_or_path"] == "new":
                raise OSError(errno.EIO, "broken")
        rename(self, place)
        return place

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="broken"):
        write_heads(target, random_heads(1, 1), base_model="new", replace=True)
    assert json.loads((target / "config.json").read_text())["base_model_name_or_path"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_what_is_no_folder_of_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        load_heads(tmp_path / "nothing", BASE)
    folder = write_others(tmp_path / "theirs", HIDDEN + 8)
    with pytest.raises(InvalidArgumentError, match="but the base model needs"):
        load_heads(folder, BASE)
