"""A base model's folder, opened: config.json and the checkpoint's headers, each read once."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lorastack.model.checkpoint import DTYPES, Checkpoint
from lorastack.model.config import load_config
from lorastack.model.weights import EMBED_WEIGHT, LM_HEAD_WEIGHT


class ModelFiles:
    """What is known of a base model before its weights are read, and single tensors of it."""

    def __init__(self, folder: Path, max_context: int | None = None) -> None:
        """Reads config.json. max_context: tokens, None for the model's own limit.

        Raises what `load_config` raises.
        """
        self.folder = folder
        self.config = load_config(folder, max_context)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Opened when it is first asked for: most adapters are checked against config.json alone.

        Raises InvalidArgumentError for files that are missing or damaged.
        """
        return Checkpoint(self.folder)

    def fingerprint(self) -> str:
        """sha256 over the model's shapes and its checkpoint's digest.

        Two servers with the same one run the same weights, whatever context they allow. Reads a few
        KiB a tensor.
        """
        shapes = replace(self.config.shapes, max_context=self.config.context_limit)
        sha = hashlib.sha256(repr(sorted(asdict(shapes).items())).encode())
        sha.update(self.checkpoint.digest())
        return f"sha256:{sha.hexdigest()}"

    def base_weight(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU. lm_head and embedding stand for each other
        where only one of them is stored.

        Raises InvalidArgumentError when the checkpoint lacks it. Any thread.
        """
        if name not in self.checkpoint.tensors:
            name = {LM_HEAD_WEIGHT: EMBED_WEIGHT, EMBED_WEIGHT: LM_HEAD_WEIGHT}.get(name, name)
        stored = self.checkpoint.find(name)
        tensor = torch.empty(stored.shape, dtype=DTYPES.get(stored.dtype, torch.float32))
        self.checkpoint.read_into(name, tensor)
        return tensor
