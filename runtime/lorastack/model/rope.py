"""Rotary position embeddings: what a config.json says about them, and how far they reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.modelfiles import check, invalid, is_int, is_number, shown
from lorastack.printable import error_line

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
MAX_LENGTH = 1 << 24  # tokens
OBJECTS = ("rope_parameters", "rope_scaling")  # transformers' name, and the older one
OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
ROPE_FIELDS = (*OBJECTS, *OUTSIDE)  # of config.json


def _optional(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _length(value: Any) -> bool:
    return is_int(value) and 0 < value <= MAX_LENGTH


# Entry -> the test of its value, and the same rule in words.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rope_type": (lambda value: isinstance(value, str), "a name"),
    "type": (lambda value: isinstance(value, str), "a name"),
    "rope_theta": (_positive, "a finite number above 0"),
    # YaRN alone does without: transformers then takes the ratio of the two lengths.
    "factor": (_optional(lambda value: is_number(value) and value >= 1), "a number of at least 1"),
    "original_max_position_embeddings": (_length, f"a number of tokens, 1 to {MAX_LENGTH}"),
    "low_freq_factor": (_positive, "a finite number above 0"),
    "high_freq_factor": (_positive, "a finite number above 0"),
    "attention_factor": (_optional(_positive), "a finite number above 0, or null"),
    "beta_fast": (_optional(_positive), "a finite number above 0, or null"),
    "beta_slow": (_optional(_positive), "a finite number above 0, or null"),
    "mscale": (_optional(is_number), "a finite number or null"),
    "mscale_all_dim": (_optional(is_number), "a finite number or null"),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
    "partial_rotary_factor": (is_number, "a finite number"),
}


def check_rope(raw: Mapping[str, Any], path: Path) -> None:
    """Check ROPE_FIELDS as they stand. Raises InvalidArgumentError naming the field."""
    for name in OUTSIDE:
        if (name, raw.get(name, "")) != ("partial_rotary_factor", None):
            _check(raw, name, path, name)
    for field in OBJECTS:
        entries = raw.get(field)
        if entries is None:
            continue
        check(isinstance(entries, dict), path, field, "an object or null", entries)
        for name in _RULES:
            _check(entries, name, path, f"{field}.{name}")


def _check(entries: Mapping[str, Any], name: str, path: Path, field: str) -> None:
    if name in entries:
        is_valid, rule = _RULES[name]
        check(is_valid(entries[name]), path, field, rule, entries[name])


def context_limit(config: Any) -> int:
    """Tokens that the model was made for.

    max_position_embeddings is the length before linear and dynamic scaling, after llama3's, and
    either one with YaRN, which has a field of its own for the length before.
    """
    rope = config.rope_parameters
    length, factor = config.max_position_embeddings, rope.get("factor")
    if factor is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return int(length)
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
    return min(int(length * factor), MAX_LENGTH)


def frequencies(config: Any, max_context: int, path: Path) -> tuple[Tensor, float]:
    """(inv_freq, what multiplies cos and sin), see `DecoderConfig`. Raises InvalidArgumentError."""
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind not in ROPE_TYPES:
        raise unsupported(f"rope_type {shown(kind)} in {path}", ", ".join(ROPE_TYPES))
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise unsupported(
            f"partial_rotary_factor other than 1 in {path}", "RoPE over the whole head"
        )
    try:
        inv_freq, scale = _computed(config, kind, max_context)
    except (ArithmeticError, TypeError, ValueError, KeyError) as error:
        raise invalid(
            f"{path}: no frequencies follow from rope_parameters: {error_line(error)}"
        ) from error
    sound = bool(inv_freq.isfinite().all()) and is_number(scale)
    check(sound, path, "rope_parameters", "values that give finite frequencies", rope)
    return inv_freq, float(scale)


def _computed(config: Any, kind: str, max_context: int) -> tuple[Tensor, float]:
    rope, size = config.rope_parameters, config.head_dim
    exponent_F = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    if kind == "default":
        return 1.0 / rope["rope_theta"] ** exponent_F, 1.0
    if kind == "dynamic":
        return _dynamic(config, max_context, exponent_F), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq_F, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq_F, float(scale)


def _dynamic(config: Any, max_context: int, exponent_F: Tensor) -> Tensor:
    """[P, F]: row n - 1 has the frequencies of a text of n tokens.

    transformers turns the tokens of a prompt by the prompt's length, and each token that follows by
    the length of the text that ends with it.
    """
    rope, size = config.rope_parameters, config.head_dim
    before, factor = config.max_position_embeddings, rope["factor"]
    length_P = torch.arange(1, max_context + 1).clamp(min=before).double()
    growth_P = (factor * length_P / before - (factor - 1)) ** (size / (size - 2))
    base_P1 = (rope["rope_theta"] * growth_P)[:, None].float()
    inv_freq_PF: Tensor = 1.0 / base_P1**exponent_F
    return inv_freq_PF


def unsupported(what: str, supported: str) -> InvalidArgumentError:
    """The error for `what` a model has and this decoder lacks. supported: what it has."""
    return InvalidArgumentError(
        f"{what} is not supported: use a model with {supported}", reason=Reason.UNSUPPORTED_MODEL
    )
