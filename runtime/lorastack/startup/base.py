"""A base model's folder as adapters are checked against it: its shapes, its tensors by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorastack.layout import ModelShapes
from lorastack.model.checkpoint import DTYPES, Checkpoint
from lorastack.model.config import load_config

_EMBED, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model_shapes(folder: Path) -> ModelShapes:
    """From config.json alone. Raises InvalidArgumentError for a model that is not supported."""
    return load_config(folder, None).shapes


def base_weight(folder: Path, name: str) -> Tensor:
    """A tensor in its stored dtype, on the CPU; tied, lm_head and embedding stand for each other.

    Raises InvalidArgumentError when the checkpoint lacks it.
    """
    checkpoint = Checkpoint(folder)
    if name not in checkpoint.tensors:
        name = {_LM_HEAD: _EMBED, _EMBED: _LM_HEAD}.get(name, name)
    stored = checkpoint.tensors.get(name)
    shape, dtype = (stored.shape, stored.dtype) if stored is not None else ((), "")
    tensor = torch.empty(shape, dtype=DTYPES.get(dtype, torch.float32))
    checkpoint.read_into(name, tensor)
    return tensor
