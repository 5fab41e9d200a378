"""PEFT LoRA folders: adapter_config.json and its tensors, honoured whole or refused by name.

Layout: PEFT's save format, `base_model.model.{module}.lora_A.weight [r, in]`,
`.lora_B.weight [out, r]`; embeddings `.lora_embedding_A [r, V]`, `.lora_embedding_B [H, r]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

from lorastack.adapters.formats.fields import check_fields
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.adapters.formats.targets import Adapted, TargetRules, module_names
from lorastack.layout import EMBED, LM_HEAD, ModelShapes, Part, TensorKey
from lorastack.tensorheader import TensorEntry

CONFIG_NAME = "adapter_config.json"
MAX_ALPHA = 1e6  # bounded, as scales of requests are, so that products stay finite
MAX_PATTERNS = 1024  # in one field; PEFT's EVA writes one for each projection of a model
MAX_TEXT = 1024  # characters of a name in a config: listings show it
# PEFT's choice for Llama and Mistral when a config names no targets.
_DEFAULT_TARGETS = frozenset({"q_proj", "v_proj"})

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|base_layer\.weight|weight|lora_velora_embed)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPart:
    """The LoRA of a folder."""

    base_model: str  # "" if the config names none
    rank: int  # the largest of any module
    alpha: float
    target_modules: tuple[str, ...]
    scales: Mapping[tuple[int, str], float]
    tensors: Mapping[TensorKey, TensorEntry]
    base_copies: Mapping[str, TensorEntry]  # base tensor name -> the folder's copy of it


def is_peft_tensor(name: str) -> bool:
    """True if a tensor of this name was saved by PEFT."""
    return name.startswith("base_model.")


def parse_peft(
    config: Mapping[str, object],
    entries: Mapping[str, TensorEntry],
    shapes: ModelShapes,
    scales: Sequence[float] | None = None,
) -> LoraPart:
    """The LoRA of a PEFT folder. `entries`: its PEFT tensors by name.

    scales: the result of an earlier call for the same folder, in the order of (layer, target); with
    them, no pattern is matched. Raises InvalidArgumentError naming the field, or the tensor and
    both shapes.
    """
    modules = module_names(shapes)
    alpha = _alpha(config.get("lora_alpha", 8), "lora_alpha")
    adapted = _resolved(config, alpha, shapes) if scales is None else None
    parts, base_copies = _sort_tensors(entries, modules, shapes)
    if adapted is None:
        adapted = _known(parts, modules, scales or ())
    if strangers := sorted(parts.keys() - adapted.keys()):
        raise invalid(f"{CONFIG_NAME} does not target {strangers[0]}, but tensors adapt it")
    tensors: dict[TensorKey, TensorEntry] = {}
    for module in sorted(adapted):
        layer, target = modules[module]
        out_size, in_size = shapes.target_shape(target)
        rank = adapted[module].rank
        for part, shape in ((Part.A, (rank, in_size)), (Part.B, (out_size, rank))):
            entry = parts.get(module, {}).get(part)
            if entry is None:
                raise invalid(f"{CONFIG_NAME} targets {module}, but its lora_{part} is missing")
            _check_shape(entry, shape)
            tensors[layer, target, part] = entry
    by_place = {modules[module]: how.scale for module, how in adapted.items()}
    return LoraPart(
        base_model=text_field(config, "base_model_name_or_path"),
        rank=max(how.rank for how in adapted.values()),
        alpha=alpha,
        target_modules=tuple(sorted({target for _, target in by_place})),
        scales=dict(sorted(by_place.items())),
        tensors=tensors,
        base_copies=base_copies,
    )


def _resolved(
    config: Mapping[str, object], alpha: float, shapes: ModelShapes
) -> dict[str, Adapted]:
    """Module -> how it is adapted, by the rules of the config."""
    check_fields(config, CONFIG_NAME)
    adapted = _rules(config, alpha).resolve(module_names(shapes))
    if not adapted:
        raise invalid(f"target_modules of {CONFIG_NAME} match no module of the base model")
    tied = shapes.tie_word_embeddings and adapted.keys() & {"lm_head", "model.embed_tokens"}
    if tied and _flag(config, "ensure_weight_tying"):
        raise unsupported(
            f"ensure_weight_tying = True in {CONFIG_NAME} is not supported for {min(tied)}"
        )
    return adapted


def _known(
    parts: Mapping[str, Mapping[Part, TensorEntry]],
    modules: Mapping[str, tuple[int, str]],
    scales: Sequence[float],
) -> dict[str, Adapted]:
    """Module -> how it is adapted, with scales that are known and the ranks of the tensors."""
    if not scales or len(parts) != len(scales):
        raise invalid(f"{len(parts)} modules have a LoRA, but {len(scales)} scales are known")
    adapted = {}
    for module, scale in zip(sorted(parts, key=modules.__getitem__), scales, strict=True):
        shape = parts[module][Part.A].shape if Part.A in parts[module] else ()
        adapted[module] = Adapted(shape[0] if shape else 0, scale)
    return adapted


def _sort_tensors(
    entries: Mapping[str, TensorEntry], modules: Mapping[str, tuple[int, str]], shapes: ModelShapes
) -> tuple[dict[str, dict[Part, TensorEntry]], dict[str, TensorEntry]]:
    """(module -> part -> entry, base tensor name -> entry). A tensor without a place is refused."""
    parts: dict[str, dict[Part, TensorEntry]] = {}
    copies: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise unsupported(
                f"tensor {name} is not part of a plain LoRA (lora_A, lora_B, lora_embedding_A, "
                "lora_embedding_B)"
            )
        module, part = match["module"], match["part"]
        if part == "lora_velora_embed":
            continue  # VeLoRA's backward pass alone reads it
        place = modules.get(module)
        if place is None:
            raise invalid(
                f"tensor {name} adapts {module}, which the base model ({shapes.architecture}, "
                f"{shapes.num_layers} layers) does not have or cannot adapt"
            )
        target = place[1]
        if part in ("weight", "base_layer.weight"):
            if target not in (EMBED, LM_HEAD):
                raise unsupported(f"tensor {name} is a whole weight, not a LoRA")
            if f"{module}.weight" in copies:
                raise invalid(f"tensor {name} is a second copy of the base model's {module}")
            _check_shape(entry, (shapes.vocab_size, shapes.hidden_size))
            copies[f"{module}.weight"] = entry
        elif part.startswith("lora_embedding") != (target == EMBED):
            raise invalid(f"tensor {name} has the wrong kind of LoRA for {module}")
        else:
            kind = Part.A if part in ("lora_A.weight", "lora_embedding_A") else Part.B
            parts.setdefault(module, {})[kind] = entry
    return parts, copies


def _check_shape(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise invalid(
            f"tensor {entry.name} has shape {list(entry.shape)}, "
            f"but the base model and {CONFIG_NAME} need {list(shape)}"
        )


def _rules(config: Mapping[str, object], alpha: float) -> TargetRules:
    """The fields that choose modules, ranks and scales. alpha: lora_alpha."""
    targets = _names(config, "target_modules")
    layers = _layers(config)
    if isinstance(targets, str) and layers is not None:
        raise invalid("layers_to_transform cannot be used when target_modules is a pattern")
    return TargetRules(
        target_modules=_DEFAULT_TARGETS if targets is None else targets,
        exclude_modules=_names(config, "exclude_modules") or frozenset(),
        layers_to_transform=layers,
        layers_pattern=_layers_pattern(config),
        rank=_rank(config.get("r", 8), "r"),
        alpha=alpha,
        rank_pattern={key: _rank(value, key) for key, value in _table(config, "rank_pattern")},
        alpha_pattern={key: _alpha(value, key) for key, value in _table(config, "alpha_pattern")},
        use_rslora=_flag(config, "use_rslora"),
    )


def _rank(value: object, field: str) -> int:
    if type(value) is not int or not 0 < value < 1 << 20:
        raise invalid(f"{field[:64]} = {str(value)[:64]} is not a rank: it must be at least 1")
    return value


def _alpha(value: object, field: str) -> float:
    if type(value) not in (int, float) or not abs(alpha := float(str(value))) <= MAX_ALPHA:
        raise invalid(
            f"{field[:64]} = {str(value)[:64]} is not a number between -{MAX_ALPHA:.0f} and "
            f"{MAX_ALPHA:.0f}"
        )
    return alpha


def _flag(config: Mapping[str, object], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{field} must be true or false")
    return value is True


def _table(config: Mapping[str, object], field: str) -> list[tuple[str, object]]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise invalid(f"{field} must map names to numbers")
    _check_number(field, value)
    return list(value.items())


def _names(config: Mapping[str, object], field: str) -> frozenset[str] | str | None:
    """A list of names, or one pattern; None when unset."""
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise invalid(f"{field} must be a list of names or one pattern")
    return frozenset(value)


def _layers(config: Mapping[str, object]) -> frozenset[int] | None:
    value = config.get("layers_to_transform")
    items = [value] if type(value) is int else value
    if items is None or items == []:
        return None
    if not isinstance(items, list) or not all(type(item) is int for item in items):
        raise invalid("layers_to_transform must be a layer index or a list of them")
    return frozenset(items)


def _layers_pattern(config: Mapping[str, object]) -> tuple[str, ...]:
    """In the config's order."""
    value = config.get("layers_pattern") or []
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise invalid("layers_pattern must be a pattern or a list of them")
    _check_number("layers_pattern", items)
    return tuple(items)


def _check_number(field: str, patterns: Sized) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise invalid(f"{field} has {len(patterns)} patterns; at most {MAX_PATTERNS} are read")


def text_field(config: Mapping[str, object], field: str) -> str:
    """A short string of the config; "" if it is missing or null."""
    value = config.get(field)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{field} must be a string")
    if len(value or "") > MAX_TEXT:
        raise invalid(f"{field} is longer than {MAX_TEXT} characters")
    return value or ""
