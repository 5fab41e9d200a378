"""Mistral-7B-Instruct-v0.2 as the hub has it, at full size or small, with made-up weights.

The weights depend on their names alone. They keep the residual stream in bounds over 32 layers and
give logits as spread as a real model's, so that texts vary.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorastack.config import cache_dir
from tests.helpers.tiny import write_json
from tests.integration.mistral_7b.tokenizer import write_tokenizer

NAME = "Mistral-7B-Instruct-v0.2"
HUB_ID = f"mistralai/{NAME}"
REVISION = 1  # raise it when this module writes something else
RING = 33_554_393  # random numbers, a prime: no two rows of a matrix are the same stretch of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What makes the model large. shard_bytes: of a file's tensors, at most."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    shard_bytes: int = 5_000_000_000


FULL = Size()
TWIN = Size(hidden=128, intermediate=448, layers=4, heads=4, kv_heads=2, shard_bytes=9_000_000)


def synthetic(size: Size) -> Path:
    """The checkpoint in the cache folder, written if it is not there; continued if it is half."""
    key = hashlib.sha256(json.dumps([REVISION, asdict(size)]).encode()).hexdigest()[:8]
    return write_checkpoint(cache_dir() / f"synthetic-{key}" / NAME, size)


def write_checkpoint(folder: Path, size: Size) -> Path:
    """config.json, tokenizer, sharded safetensors; the index, last, says that all is there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _config(size))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0"}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    write_tokenizer(folder)
    shards = _shards(size)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        if not (folder / name).exists():
            part = folder / f"{name}.part"
            with part.open("wb") as file:
                _write_shard(file, shapes)
            part.replace(folder / name)
    total = sum(2 * prod(shape) for shapes in shards for shape in shapes.values())
    staged = index.with_suffix(".part")
    write_json(staged, {"metadata": {"total_size": total}, "weight_map": weight_map})
    staged.replace(index)
    return folder


def _config(size: Size) -> dict[str, object]:
    """The published config.json."""
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": 32000,
    }


def _shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor, in the published order."""
    hidden, middle = size.hidden, size.intermediate
    key = size.kv_heads * (hidden // size.heads)
    yield "model.embed_tokens.weight", (32000, hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, middle)
        yield f"{prefix}.mlp.gate_proj.weight", (middle, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (middle, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.k_proj.weight", (key, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (key, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (32000, hidden)


def _shards(size: Size) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    left = size.shard_bytes
    for name, shape in _shapes(size):
        nbytes = 2 * prod(shape)
        if nbytes > left:
            shards.append({})
            left = size.shard_bytes
        shards[-1][name] = shape
        left -= nbytes
    return shards


def _write_shard(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file, tensor by tensor: the library would want all of them at once."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    ring = torch.randn(RING, generator=torch.Generator().manual_seed(7)).bfloat16()
    for name, shape in shapes.items():
        mean, spread = _distribution(name, shape)
        for values in _stretches(ring, name, prod(shape)):
            written = values.float().mul_(spread).add_(mean).bfloat16()
            file.write(written.view(torch.uint8).numpy().data)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation. A projection of states around 1 gives values around 1."""
    if "norm" in name:
        return 1.0, 0.1
    if "embed" in name:
        return 0.0, 1.0
    sharpened = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0}
    factor = next((value for part, value in sharpened.items() if part in name), 1.0)
    return 0.0, factor / shape[-1] ** 0.5


def _stretches(ring: Tensor, name: str, count: int) -> Iterator[Tensor]:
    """`count` numbers of the ring, from a place that the name decides."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") % RING
    while count:
        values = ring[start : start + count]
        yield values
        count -= len(values)
        start = 0
