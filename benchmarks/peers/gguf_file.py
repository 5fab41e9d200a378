"""A GGUF of a Llama folder, for engines that read nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_gguf(model: Path, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices of `model` (float32 safetensors, architecture llama) as `kind`, norms in float32."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    _write_shapes(writer, config)
    _write_tokens(writer, model)
    for name, array in load_file(model / "model.safetensors").items():
        _write_tensor(writer, name.removesuffix(".weight"), array, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shapes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _write_tokens(writer: gguf.GGUFWriter, model: Path) -> None:
    """Prompts come as ids; the vocabulary is here because no engine loads a file without one."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    types = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([types[index in special] for index in sorted(vocabulary.values())])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    array: np.ndarray[Any, np.dtype[np.float32]],
    config: dict[str, Any],
    kind: gguf.GGMLQuantizationType,
) -> None:
    layer = LAYER.fullmatch(name)
    stem = f"blk.{layer[1]}.{NAMES[layer[2]]}" if layer else NAMES[name]
    for suffix, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        if stem.endswith(suffix):
            array = interleaved(array, config[heads])
    if array.ndim == 1:
        writer.add_tensor(f"{stem}.weight", array)
    else:
        writer.add_tensor(f"{stem}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)


def interleaved(
    weight: np.ndarray[Any, np.dtype[np.float32]], num_heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of q or k in llama.cpp's order, where the two that RoPE turns together are neighbours.

    weight: [heads * D, H], each head's halves one after the other.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
