"""What a model's folder says before its weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.errors import InvalidArgumentError
from lorastack.startup.files import ModelFiles

SINGLE, EMBED = "model.safetensors", "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def fingerprint(folder: Path) -> str:
    return ModelFiles(folder).fingerprint()


def test_fingerprint_knows_weights_and_shapes(folder: Path, tiny_llama: Path) -> None:
    assert fingerprint(folder) == fingerprint(tiny_llama)
    assert re.fullmatch("sha256:[0-9a-f]{64}", fingerprint(folder))
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"].add_(1e-3)
    save_file(tensors, folder / SINGLE)
    changed = fingerprint(folder)
    assert changed != fingerprint(tiny_llama)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert fingerprint(folder) not in (changed, fingerprint(tiny_llama))


def test_fingerprint_does_not_depend_on_the_context_that_is_allowed(tiny_llama: Path) -> None:
    assert ModelFiles(tiny_llama, max_context=40).fingerprint() == fingerprint(tiny_llama)


def test_embedding_and_lm_head_stand_for_each_other(tiny_llama: Path) -> None:
    files = ModelFiles(tiny_llama)
    stored = load_file(tiny_llama / SINGLE)[EMBED]
    for name in (EMBED, "lm_head.weight"):
        assert torch.equal(files.base_weight(name), stored)
    with pytest.raises(InvalidArgumentError, match="no tensor other"):
        files.base_weight("other")


def test_shapes_are_known_without_weights(folder: Path) -> None:
    """As `lorastack adapters verify` needs it."""
    (folder / SINGLE).unlink()
    files = ModelFiles(folder)
    assert files.config.shapes.hidden_size > 0
    with pytest.raises(InvalidArgumentError, match=SINGLE):
        files.base_weight(EMBED)
