"""config.json of a Hugging Face folder -> what the decoder needs, or a refusal by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import ModelShapes

CONFIG_CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig"}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# Files in which tools say how they quantised the weights -> those that write them so.
QUANTISERS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
# What the decoder reads of a config.json, and the types it has there.
FIELDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), bool),
    **{"max_position_embeddings": int, "rms_norm_eps": float, "hidden_act": str},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """shapes.max_context is the limit in force. window: tokens, None for full attention.

    inv_freq: RoPE frequencies [D / 2], float32; rope_scale multiplies cos and sin (YaRN's).
    has_heads: Medusa heads lie beside the backbone.
    """

    shapes: ModelShapes
    rms_eps: float
    window: int | None
    attention_bias: bool
    mlp_bias: bool
    inv_freq: Tensor
    rope_scale: float
    has_heads: bool = False


def load_config(folder: Path, max_context: int | None) -> DecoderConfig:
    """Read folder/config.json. max_context: tokens, None for the model's own limit.

    Raises InvalidArgumentError: no such file, an unsupported architecture, activation, RoPE variant
    or quantization, or a max_context beyond what the model was made for.
    """
    raw = _read(folder)
    config = _parse(raw, folder)
    return DecoderConfig(
        shapes=_shapes(config, max_context),
        rms_eps=config.rms_norm_eps,
        window=config.sliding_window if config.model_type == "mistral" else None,
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        has_heads="medusa_num_heads" in raw,
        **_rope(config, max_context),
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _invalid(f"{folder} has no config.json: give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise _invalid(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise _invalid(f"{path} is not a JSON object")
    return raw


def _parse(raw: dict[str, Any], folder: Path) -> Any:
    """The fields of a supported model's config, by transformers' names."""
    names = raw.get("architectures") or []
    for name in names:
        if name not in ARCHITECTURES:
            raise _unsupported(f"architecture {name}", " or ".join(ARCHITECTURES))
    model_type = raw.get("model_type")
    if model_type not in CONFIG_CLASSES:
        raise _unsupported(f"model type {model_type!r}", " or ".join(CONFIG_CLASSES))
    _refuse_quantised(raw, folder)
    config = _plain(raw) or _by_transformers(raw, folder)
    if config.hidden_act not in ("silu", "swish"):
        raise _unsupported(f"activation {config.hidden_act!r}", "silu")
    if config.num_attention_heads % config.num_key_value_heads:
        raise _invalid(
            f"{config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} key-value heads evenly: correct config.json"
        )
    return config


def _refuse_quantised(raw: dict[str, Any], folder: Path) -> None:
    """Weights that GPTQ, AWQ and the like made; some of their tools describe them apart."""
    if quantization := raw.get("quantization_config"):
        named = isinstance(quantization, dict)
        method = str(quantization.get("quant_method", "unnamed") if named else quantization)
        where = "config.json"
    else:
        found = [name for name in QUANTISERS if (folder / name).is_file()]
        if not found:
            return
        where, method = found[0], QUANTISERS[found[0]]
    raise InvalidArgumentError(
        f"{where} of {folder} says that the weights are quantised by {method[:64]}, which "
        "is not supported: use the original checkpoint, with --quantize int8 or int4",
        reason=Reason.UNSUPPORTED_MODEL,
    )


def _plain(raw: dict[str, Any]) -> Any:
    """The fields as they stand, if nothing needs a default, a check or a conversion; else None.

    Spares the server a second of imports.
    """
    rope = raw.get("rope_parameters")
    if not (
        raw["model_type"] == "llama"
        and all(type(raw.get(name)) is kind for name, kind in FIELDS.items())
        and all(raw[name] > 0 for name, kind in FIELDS.items() if kind is int)
        and raw["hidden_size"] % raw["num_attention_heads"] == 0
        and isinstance(rope, dict)
        and rope.keys() == {"rope_type", "rope_theta"}
        and (rope["rope_type"], type(rope["rope_theta"])) == ("default", float)
        and not {"rope_scaling", "rope_theta", "partial_rotary_factor"} & raw.keys()
    ):
        return None
    return SimpleNamespace(**raw)


def _by_transformers(raw: dict[str, Any], folder: Path) -> Any:
    # Where another thread (the tokenizer's) is importing it, an import statement gives the module
    # that transformers replaces at the end of its own import.
    transformers = import_module("transformers")
    try:
        return getattr(transformers, CONFIG_CLASSES[raw["model_type"]]).from_dict(raw)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise _invalid(f"{folder / 'config.json'} is not valid: {error}") from error


def _shapes(config: Any, max_context: int | None) -> ModelShapes:
    limit = _context_limit(config)
    if max_context is not None and not 0 < max_context <= limit:
        raise _invalid(
            f"max_context {max_context} is not in 1..{limit}, what the model was made for"
        )
    return ModelShapes(
        architecture=f"{config.model_type.capitalize()}ForCausalLM",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_context=max_context or config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
    )


def _context_limit(config: Any) -> int:
    """Linear and dynamic scaling state the length before scaling, the others the one after it."""
    rope = config.rope_parameters
    stretch = rope["factor"] if rope["rope_type"] in ("linear", "dynamic") else 1
    return int(config.max_position_embeddings * stretch)


def _rope(config: Any, max_context: int | None) -> dict[str, Any]:
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise _unsupported(f"RoPE type {kind!r}", ", ".join(ROPE_TYPES))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("partial_rotary_factor other than 1", "RoPE over the whole head")
    if kind == "default":
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return {"inv_freq": 1.0 / rope["rope_theta"] ** exponent, "rope_scale": 1.0}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # transformers lets dynamic scaling follow the longest text of a batch: a row would depend on
    # others. Here it is fixed: the one for a text as long as the context limit in force.
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_context)
    return {"inv_freq": inv_freq, "rope_scale": float(scale)}


def _unsupported(what: str, supported: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{what} is not supported: use a model with {supported}", reason=Reason.UNSUPPORTED_MODEL
    )


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=Reason.INVALID_MODEL)
