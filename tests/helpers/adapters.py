"""Random PEFT LoRA folders and Medusa folders for given shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from tests.helpers.tiny import write_json

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def module_path(layer: int, target: str) -> str:
    """The dotted name of a target's module in a Hugging Face Llama or Mistral."""
    if target == LM_HEAD:
        return LM_HEAD
    if target == EMBED:
        return f"model.{EMBED}"
    block = "self_attn" if target in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{target}"


def lora_tensor_names(layer: int, target: str) -> tuple[str, str]:
    """PEFT's keys of a target's A and B."""
    path = f"base_model.model.{module_path(layer, target)}"
    if target == EMBED:
        return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def lora_config(rank: int, alpha: float, targets: Sequence[str], **fields: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it, reduced to what matters."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "inference_mode": True,
        **fields,
    }


def write_lora_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", dict(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def write_lora(
    folder: Path,
    shapes: ModelShapes,
    *,
    seed: int = 0,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = LAYER_TARGETS,
    layers: Sequence[int] | None = None,
    strength: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """A random LoRA that visibly changes the output: scale * B @ A has entries of about
    strength / sqrt(in) whatever the rank.

    layers: the only layers adapted (written as layers_to_transform); fields: more of
    adapter_config.json (use_rslora, base_model_name_or_path, ...).
    """
    generator = torch.Generator().manual_seed(seed)
    if layers is not None:
        fields["layers_to_transform"] = list(layers)
    tensors: dict[str, torch.Tensor] = {}
    scale = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
    for target in targets:
        out, inner = shapes.target_shape(target)
        chosen = range(shapes.num_layers) if layers is None else layers
        for layer in (0,) if target in (EMBED, LM_HEAD) else chosen:
            # An embedding reads one column of A, so nothing averages over `in` there.
            a_std = 1.0 if target == EMBED else inner**-0.5
            a = torch.randn(rank, inner, generator=generator) * a_std
            b = torch.randn(out, rank, generator=generator) * (strength / scale / rank**0.5)
            name_a, name_b = lora_tensor_names(layer, target)
            tensors[name_a], tensors[name_b] = a.to(dtype), b.to(dtype)
    return write_lora_tensors(folder, tensors, lora_config(rank, alpha, targets, **fields))


def heads_config(num_heads: int, **fields: Any) -> dict[str, Any]:
    return {"medusa_num_heads": num_heads, "medusa_num_layers": 1, "version": "2", **fields}


def write_heads_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    save_file(dict(tensors), folder / "medusa_lm_head.safetensors", metadata={"format": "pt"})
    return folder


def write_heads(
    folder: Path,
    hidden_size: int,
    *,
    num_heads: int = 3,
    num_blocks: int = 1,
    vocab_size: int | None = None,
    seed: int = 0,
    strength: float = 0.1,
    dtype: torch.dtype = torch.float32,
    draft_vocabulary: Sequence[int] = (),
    **fields: Any,
) -> Path:
    """Random Medusa heads: close to the identity for a small strength.

    Version 2; or, with a vocab_size, version 1 with an output matrix each, and a config as such
    heads are published with.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for head in range(num_heads):
        for block in range(num_blocks):
            weight = torch.randn(hidden_size, hidden_size, generator=generator)
            tensors[f"{head}.{block}.linear.weight"] = (weight * strength).to(dtype)
            bias = torch.randn(hidden_size, generator=generator)
            tensors[f"{head}.{block}.linear.bias"] = (bias * strength).to(dtype)
        if vocab_size is not None:
            output = torch.randn(vocab_size, hidden_size, generator=generator)
            tensors[f"{head}.{num_blocks}.weight"] = output.to(dtype)
    config = heads_config(num_heads, medusa_num_layers=num_blocks, **fields)
    if vocab_size is not None:
        del config["version"]
    if draft_vocabulary:
        write_draft_vocabulary(folder, torch.tensor(draft_vocabulary))
    return write_heads_tensors(folder, tensors, config)


def private_config(whole: Path, rank: int, shared_id: str, **fields: Any) -> dict[str, Any]:
    """config.json of a private part of the heads in the folder `whole`."""
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    weights = (whole / "medusa_lm_head.safetensors").read_bytes()
    return {
        **{name: config[name] for name in ("medusa_num_heads", "medusa_num_layers", "version")},
        "shared_heads": {"id": shared_id, "sha256": hashlib.sha256(weights).hexdigest()},
        "private_rank": rank,
        **fields,
    }


def write_private(
    folder: Path,
    whole: Path,
    *,
    rank: int = 3,
    seed: int = 0,
    strength: float = 0.3,
    shared_id: str = "",
    **fields: Any,
) -> Path:
    """A random private part of the heads in the folder `whole`, stored as shared_id (its name).

    A small strength leaves them close to what they are.
    """
    generator = torch.Generator().manual_seed(seed)
    config = private_config(whole, rank, shared_id or whole.name, **fields)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(whole / "medusa_lm_head.safetensors").items():
        if name.endswith(".linear.weight"):
            block, (out, inner) = name.removesuffix("weight"), tensor.shape
            a_RH = torch.randn(rank, inner, generator=generator) * inner**-0.5
            b_HR = torch.randn(out, rank, generator=generator) * strength
            tensors |= {f"{block}lora_A.weight": a_RH, f"{block}lora_B.weight": b_HR}
    return write_heads_tensors(folder, tensors, config)


def merged_heads(folder: Path, whole: Path, part: Path) -> Path:
    """The heads of `whole` with a private part added to their weights."""
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(whole / "medusa_lm_head.safetensors")
    private = load_file(part / "medusa_lm_head.safetensors")
    for name in tensors:
        block = name.removesuffix("weight")
        if f"{block}lora_A.weight" in private:
            tensors[name] += private[f"{block}lora_B.weight"] @ private[f"{block}lora_A.weight"]
    if (vocabulary := whole / "draft_vocabulary.safetensors").exists():
        write_draft_vocabulary(folder, load_file(vocabulary)["draft_vocabulary"])
    return write_heads_tensors(folder, tensors, config)


def write_draft_vocabulary(folder: Path, ids_N: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"draft_vocabulary": ids_N}, folder / "draft_vocabulary.safetensors")


def with_outputs(folder: Path, heads: Path, output_VH: torch.Tensor) -> Path:
    """Version 2 heads as version 1: every head brings a copy of the same output matrix."""
    config = json.loads((heads / "config.json").read_text(encoding="utf-8"))
    del config["version"]
    tensors = load_file(heads / "medusa_lm_head.safetensors")
    for head in range(config["medusa_num_heads"]):
        tensors[f"{head}.{config['medusa_num_layers']}.weight"] = output_VH.clone()
    return write_heads_tensors(folder, tensors, config)
