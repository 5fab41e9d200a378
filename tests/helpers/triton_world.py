"""A tiny model on Triton's kernels in one dtype, and the same in torch and float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorastack.kernels.quantize import Kind
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.kv import KVCache
from tests.helpers.adapters import write_lora
from tests.helpers.mixed_loras import LORAS
from tests.helpers.packed import read_weights
from tests.helpers.tiny import VOCAB_SIZE, shapes_of

PAGE, NUM_PAGES = 4, 64
# The interpreter takes about a second a step and layer of it.
SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class World:
    """loras: beside `LORAS`, each of its backend's dtype."""

    backend: Backend
    reference: Backend
    loras: list[LoraWeights]
    reference_loras: list[LoraWeights]

    def cache(self, backend: Backend | None = None) -> KVCache:
        """Full of NaN: what an earlier owner left must not matter."""
        kv = (backend or self.backend).make_kv(NUM_PAGES, PAGE)
        kv.data.fill_(torch.nan)
        return kv


def build_world(
    root: Path,
    build: Callable[..., Path],
    fields: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind | None = None,
) -> World:
    """build: of `tests.helpers.tiny`, called with `fields` beside SMALL's."""
    folder = build(root / "model", **(SMALL | fields))
    if kind is not None:  # what both read must be the same for codes to be
        file = folder / "model.safetensors"
        rounded = {name: each.bfloat16() for name, each in load_file(file).items()}
        save_file(rounded, file, {"format": "pt"})
    shapes = shapes_of(folder)
    folders = [write_lora(root / name, shapes, **each) for name, each in LORAS.items()]
    backend = load_backend(
        folder, device=device, dtype=dtype, max_context=None, quantize=kind, triton=True
    )
    assert backend.name == "triton"
    reference = load_backend(
        folder, device=device, dtype=torch.float32, max_context=None, native=False, quantize=kind
    )
    return World(
        backend,
        reference,
        [read_weights(path, shapes, dtype) for path in folders],
        [read_weights(path, shapes) for path in folders],
    )


def tokens(count: int, seed: int) -> list[int]:
    """Random ids."""
    return random.Random(seed).choices(range(4, VOCAB_SIZE), k=count)
