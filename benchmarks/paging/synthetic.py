"""LoRAs of the default model with random weights: q and v projections, mixed ranks."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorastack.adapters.store.manifest import Record, file_spec
from lorastack.adapters.store.registry import Registry
from lorastack.adapters.store.upload import Validate
from lorastack.client import Client

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_LAYERS, HIDDEN, KEY, MIDDLE = 30, 576, 192, 1536
# Block, inputs and outputs of every projection.
TARGETS = {
    "q_proj": ("self_attn", HIDDEN, HIDDEN),
    "k_proj": ("self_attn", HIDDEN, KEY),
    "v_proj": ("self_attn", HIDDEN, KEY),
    "o_proj": ("self_attn", HIDDEN, HIDDEN),
    "gate_proj": ("mlp", HIDDEN, MIDDLE),
    "up_proj": ("mlp", HIDDEN, MIDDLE),
    "down_proj": ("mlp", MIDDLE, HIDDEN),
}
# Mean rank 15: 1.7 MB a LoRA in bfloat16.
RANKS = (4, 8, 16, 32, 64)
SHARES = (0.30, 0.30, 0.20, 0.15, 0.05)
# Elements a rank: A and B of q_proj and v_proj of every layer.
ELEMENTS_A_RANK = NUM_LAYERS * (2 * HIDDEN + HIDDEN + KEY)


def ranks(count: int, seed: int = 0) -> list[int]:
    """The ranks of `count` adapters."""
    return random.Random(seed).choices(RANKS, SHARES, k=count)


def adapter_id(index: int) -> str:
    return f"synthetic/{index:05d}"


def device_bytes(rank: int, itemsize: int) -> int:
    """Bytes of one adapter in a server whose dtype has `itemsize` bytes."""
    return rank * ELEMENTS_A_RANK * itemsize


def write_adapter(
    folder: Path, rank: int, seed: int, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> None:
    """A PEFT folder. Weights are small enough that texts stay finite."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for target in targets:
            block, width, out = TARGETS[target]
            path = f"base_model.model.model.layers.{layer}.{block}.{target}"
            for part, shape in (("A", (rank, width)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator) * 0.01
                tensors[f"{path}.lora_{part}.weight"] = values.bfloat16()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE_MODEL,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@contextmanager
def scratch_folder(rank: int, seed: int) -> Iterator[Path]:
    """A written adapter that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="lorastack-") as name:
        write_adapter(Path(name), rank, seed)
        yield Path(name)


def upload(client: Client, first: int, all_ranks: list[int]) -> list[str]:
    """Uploads adapters first, first + 1, ..., one for each rank; returns their ids."""
    ids = []
    for index, rank in enumerate(all_ranks, start=first):
        with scratch_folder(rank, index) as folder:
            client.upload(folder, adapter_id(index))
        ids.append(adapter_id(index))
    return ids


def store_folder(
    registry: Registry, adapter_id: str, folder: Path, validate: Validate, *, base_fingerprint: str
) -> Record:
    """What an upload does, without a server."""
    paths = sorted(folder.iterdir())
    specs = [file_spec(path) for path in paths]
    upload = registry.begin_upload(adapter_id, specs)
    for path, spec in zip(paths, specs, strict=True):
        upload.write(spec.sha256, 0, path.read_bytes())
    return upload.commit(validate, base_fingerprint=base_fingerprint)
