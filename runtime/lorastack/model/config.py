"""config.json of a Hugging Face folder -> what the decoder needs, or a refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import ModelShapes
from lorastack.model.rope import (
    MAX_LENGTH,
    ROPE_FIELDS,
    check_rope,
    context_limit,
    frequencies,
    unsupported,
)
from lorastack.modelfiles import (
    MAX_INT,
    check,
    invalid,
    is_int,
    is_number,
    read_object,
    shown,
)
from lorastack.printable import error_line

CONFIG_CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig"}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
# Files in which tools say how they quantised the weights -> the tools.
QUANTISERS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
# Fields of config.json that the decoder reads -> their types.
FIELDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), bool),
    **{"max_position_embeddings": int, "rms_norm_eps": float, "hidden_act": str},
}
# Fields that may also be null: they follow from others then.
OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")
HEADS_FIELDS_PREFIX, HEADS_FIELD = "medusa_", "medusa_num_heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder without its weights. shapes.max_context is the limit in force.

    window: tokens, None for full attention. inv_freq: RoPE frequencies, float32 [D / 2]; with
    dynamic_rope_begin [max_context, D / 2], where row n - 1 is for a text of n tokens and differs
    from the one before beyond dynamic_rope_begin tokens. rope_scale: multiplies cos and sin (YaRN).
    context_limit: tokens that the model was made for. medusa: what config.json says of Medusa heads
    beside the backbone, by its field names.
    """

    shapes: ModelShapes
    rms_eps: float
    window: int | None
    attention_bias: bool
    mlp_bias: bool
    inv_freq: Tensor
    rope_scale: float
    context_limit: int
    dynamic_rope_begin: int | None = None
    medusa: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_heads(self) -> bool:
        """True if heads lie beside the backbone."""
        return HEADS_FIELD in self.medusa


def load_config(folder: Path, max_context: int | None) -> DecoderConfig:
    """Read folder/config.json. max_context: tokens, None for the model's own limit.

    Raises InvalidArgumentError: no such file, an unsupported architecture, activation, RoPE variant
    or quantization, or a max_context beyond what the model was made for.
    """
    path = folder / "config.json"
    if not path.exists():
        raise invalid(f"{folder} has no config.json: give a Hugging Face model folder")
    raw = read_object(path)
    config = _parse(raw, folder)
    limit = context_limit(config)
    if max_context is not None and not 0 < max_context <= limit:
        raise invalid(
            f"max_context {max_context} is not in 1..{limit}, what the model was made for"
        )
    shapes = _shapes(config, max_context or limit)
    inv_freq, rope_scale = frequencies(config, shapes.max_context, path)
    # transformers' Mistral has no biases, whatever its config.json says.
    is_llama = config.model_type == "llama"
    return DecoderConfig(
        shapes=shapes,
        rms_eps=config.rms_norm_eps,
        window=None if is_llama else config.sliding_window,
        attention_bias=is_llama and config.attention_bias,
        mlp_bias=is_llama and config.mlp_bias,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        context_limit=limit,
        dynamic_rope_begin=config.max_position_embeddings if inv_freq.dim() == 2 else None,
        medusa={name: raw[name] for name in raw if name.startswith(HEADS_FIELDS_PREFIX)},
    )


def _parse(raw: dict[str, Any], folder: Path) -> Any:
    """The fields of a supported model's config, by transformers' names."""
    path = folder / "config.json"
    names = raw.get("architectures")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    check(names is None or is_list, path, "architectures", "a list of names or null", names)
    for name in names or []:
        if name not in ARCHITECTURES:
            raise unsupported(f"architectures: {name[:64]} in {path}", " or ".join(ARCHITECTURES))
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        raise unsupported(f"model_type {shown(model_type)} in {path}", " or ".join(CONFIG_CLASSES))
    _refuse_quantised(raw, folder)
    _check_fields(raw, path)
    check_rope(raw, path)
    config = _plain(raw) or _by_transformers(raw, path)
    if config.hidden_act not in ("silu", "swish"):
        raise unsupported(f"hidden_act {shown(config.hidden_act)} in {path}", "silu")
    if config.num_attention_heads % config.num_key_value_heads:
        raise invalid(
            f"{path}: num_attention_heads and num_key_value_heads do not fit: "
            f"{config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} key-value heads evenly"
        )
    size, rule = config.head_dim, "even and above 2 (unset: hidden_size / num_attention_heads)"
    check(size > 2 and size % 2 == 0, path, "head_dim", rule, size)
    return config


def _check_fields(raw: Mapping[str, Any], path: Path) -> None:
    """Check FIELDS as they stand. Raises InvalidArgumentError naming the field."""
    fields = FIELDS if raw["model_type"] == "llama" else {**FIELDS, "sliding_window": int}
    for name, kind in fields.items():
        if name not in raw or (raw[name] is None and name in OPTIONAL):
            continue
        value = raw[name]
        if kind is int:
            most = MAX_LENGTH if name == "max_position_embeddings" else MAX_INT
            ok = is_int(value) and 0 < value <= most
            check(ok, path, name, f"a whole number, 1 to {most}", value)
        elif kind is float:
            check(is_number(value) and value >= 0, path, name, "a number of at least 0", value)
        else:
            rule = "true or false" if kind is bool else "a name"
            check(isinstance(value, kind), path, name, rule, value)
    if raw.get("per_layer_config"):
        raise unsupported(f"per_layer_config in {path}", "the same sizes in every layer")


def _refuse_quantised(raw: dict[str, Any], folder: Path) -> None:
    """Refuse the weights of GPTQ, AWQ and the like; some tools describe them in a file apart."""
    if quantization := raw.get("quantization_config"):
        is_object = isinstance(quantization, dict)
        method = str(quantization.get("quant_method", "unnamed") if is_object else quantization)
        where = "config.json"
    else:
        names = [name for name in QUANTISERS if (folder / name).is_file()]
        if not names:
            return
        where, method = names[0], QUANTISERS[names[0]]
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


def _by_transformers(raw: dict[str, Any], path: Path) -> Any:
    # Where another thread (the tokenizer's) is importing it, an import statement gives the module
    # that transformers replaces at the end of its own import.
    transformers = import_module("transformers")
    names = (*FIELDS, "model_type", "sliding_window", "layer_types", *ROPE_FIELDS)
    fields = {name: raw[name] for name in names if name in raw}
    try:
        return getattr(transformers, CONFIG_CLASSES[raw["model_type"]]).from_dict(fields)
    except Exception as error:  # whatever a foreign file makes it raise
        raise invalid(f"{path} is not valid: {error_line(error)}") from error


def _shapes(config: Any, max_context: int) -> ModelShapes:
    return ModelShapes(
        architecture=f"{config.model_type.capitalize()}ForCausalLM",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_context=max_context,
        tie_word_embeddings=config.tie_word_embeddings,
    )
