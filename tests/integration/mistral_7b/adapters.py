"""The adapters of the scenario, in published layouts, for a model of Mistral's architecture."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from lorastack.layout import ModelShapes
from tests.helpers.adapters import write_heads, write_lora
from tests.integration.mistral_7b.checkpoint import HUB_ID

HEADS, OWN_HEADS, BUNDLE = "heads-v2", "heads-v1", "bundle"
RANKS = {"lora-r8": 8, "lora-r16": 16, "lora-r64": 64}
REAL = {
    "lora-real": "LORASTACK_MISTRAL_7B_LORA",
    "heads-real": "LORASTACK_MISTRAL_7B_MEDUSA",
}  # the variables name a folder or a hub id each


def write_adapters(root: Path, shapes: ModelShapes) -> dict[str, Path]:
    """Adapter id -> folder: random ones, and the real ones that the environment names."""
    base: dict[str, Any] = {"base_model_name_or_path": HUB_ID}
    hidden = shapes.hidden_size
    written = {
        name: write_lora(
            root / name, shapes, seed=rank, rank=rank, alpha=2 * rank, dtype=torch.bfloat16, **base
        )
        for name, rank in RANKS.items()
    }
    written[HEADS] = write_heads(
        root / HEADS, hidden, num_heads=3, dtype=torch.float16, strength=hidden**-0.5, **base
    )
    written[OWN_HEADS] = write_heads(
        root / OWN_HEADS,
        hidden,
        num_heads=3,
        vocab_size=shapes.vocab_size,
        seed=1,
        dtype=torch.float16,
        strength=hidden**-0.5,
        **base,
    )
    written[BUNDLE] = write_lora(
        root / BUNDLE, shapes, seed=99, rank=16, alpha=32, dtype=torch.bfloat16, **base
    )
    for path in written[HEADS].iterdir():
        shutil.copy(path, written[BUNDLE])
    for name, variable in REAL.items():
        if place := os.environ.get(variable):
            written[name] = Path(place if Path(place).is_dir() else snapshot_download(place))
    return written
