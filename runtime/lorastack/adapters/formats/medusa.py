"""Medusa heads: config.json with medusa_num_heads, and residual blocks for each head.

Head i (0-based) has L = medusa_num_layers blocks in both versions, `{i}.{l}.linear.weight [H, H]`
and `{i}.{l}.linear.bias [H]` for l < L. In version 2 the base model's lm_head follows; in version 1
an output matrix of the head's own, `{i}.{L}.weight [V, H]`. The tensors decide which version it is;
a folder whose `version` says otherwise is refused.

Beside version 2 heads a folder may have `draft_vocabulary.safetensors`, our extra file: one tensor
`draft_vocabulary`, I32 or I64 [N], the rising ids of the tokens that the heads choose from. And
config.json may have `acceptance`: what adaptive trees start from, the JSON of a
`speculation.calibration.Calibration`. `private` describes heads that are a correction of others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorastack.adapters.formats import private
from lorastack.adapters.formats.facts import SharedHeads
from lorastack.adapters.formats.peft import text_field
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.adapters.formats.tensorfile import INTEGERS, read_header
from lorastack.errors import InvalidArgumentError
from lorastack.layout import (
    HEADS,
    MAX_DRAFT_VOCABULARY,
    MAX_PRIVATE_RANK,
    MAX_RANK,
    ModelShapes,
    Part,
    TensorKey,
    head_block,
)
from lorastack.tensorheader import TensorEntry

CONFIG_NAME = "config.json"
VOCABULARY_NAME = "draft_vocabulary.safetensors"
VOCABULARY_TENSOR = "draft_vocabulary"
HEADS_FIELD = "medusa_num_heads"
LAYERS_FIELD = "medusa_num_layers"
ACCEPTANCE_FIELD = "acceptance"
MAX_HEADS = 32
MAX_LAYERS = 32
MAX_ACCEPTANCE = 64 << 10  # characters; `Calibration.to_json` writes 50,000 at most
_TENSOR = re.compile(
    r"(?:0|[1-9]\d{0,3})\.(?:0|[1-9]\d{0,3})\."
    r"(?:linear\.weight|linear\.bias|weight|linear\.lora_[AB]\.weight)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsPart:
    """The Medusa heads of a folder, or its private part of others.

    acceptance: the config's, "" if it has none; only its size was checked.
    """

    base_model: str  # "" if the config names none
    num_heads: int
    num_layers: int
    version: int
    draft_vocabulary: tuple[int, ...]  # rising token ids; () for all
    shared_heads: SharedHeads | None  # None for whole heads
    private_rank: int  # 0 for whole heads
    acceptance: str
    tensors: Mapping[TensorKey, TensorEntry]


def is_heads_tensor(name: str) -> bool:
    """True if a tensor of this name belongs to Medusa heads."""
    return _TENSOR.fullmatch(name) is not None


def parse_medusa(
    config: Mapping[str, object],
    entries: Mapping[str, TensorEntry],
    vocabulary: Path | None,
    shapes: ModelShapes,
) -> HeadsPart:
    """The heads of a folder. entries: their tensors by name; vocabulary: VOCABULARY_NAME's path.

    Raises InvalidArgumentError naming the field, or the tensor and both shapes.
    """
    num_heads = _count(config, HEADS_FIELD, MAX_HEADS)
    num_layers = _count(config, LAYERS_FIELD, MAX_LAYERS, default=1)
    shared: SharedHeads | None = None
    rank = 0
    if private.is_private(config):
        private.check_version(config, CONFIG_NAME)
        version = 2
        shared = private.shared_heads(config, CONFIG_NAME)
        rank = _count(config, private.RANK_FIELD, MAX_PRIVATE_RANK)
        expected = private.expected_tensors(num_heads, num_layers, rank, shapes.hidden_size)
    else:
        version = _version(config, entries)
        expected = _expected(num_heads, num_layers, version, shapes)
    _check_tensors(config, entries, expected)
    if vocabulary is not None and version == 1:
        raise invalid(
            f"{VOCABULARY_NAME} goes with version 2 heads, but these are version 1, with output "
            "matrices of their own: leave it out"
        )
    return HeadsPart(
        base_model=text_field(config, "base_model_name_or_path"),
        num_heads=num_heads,
        num_layers=num_layers,
        version=version,
        draft_vocabulary=() if vocabulary is None else _draft_vocabulary(vocabulary, shapes),
        shared_heads=shared,
        private_rank=rank,
        acceptance=_acceptance(config),
        tensors={key: entries[name] for name, (key, _) in expected.items()},
    )


def _check_tensors(
    config: Mapping[str, object],
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[TensorKey, tuple[int, ...]]],
) -> None:
    """Raises InvalidArgumentError unless these are the tensors that the config asks for."""
    part = private.is_private(config)
    fields = [HEADS_FIELD, LAYERS_FIELD, *([private.RANK_FIELD] if part else [])]
    says = " and ".join(f"{field} = {config.get(field, 1)}" for field in fields)
    for name, entry in entries.items():
        if name not in expected:
            if part != (private.PRIVATE_TENSOR.fullmatch(name) is not None):
                raise _of_the_other_kind(name, part)
            raise invalid(f"tensor {name} belongs to no head: {CONFIG_NAME} says {says}")
        _, shape = expected[name]
        if entry.shape != shape:
            raise invalid(
                f"tensor {name} has shape {list(entry.shape)}, "
                f"but the base model needs {list(shape)}"
                + (f" ({CONFIG_NAME} says {says})" if part else "")
            )
    if missing := sorted(expected.keys() - entries.keys()):
        raise invalid(f"{CONFIG_NAME} says {says}, but {missing[0]} is missing")


def _of_the_other_kind(name: str, part: bool) -> InvalidArgumentError:
    """Of a tensor of whole heads in a private part, or the reverse."""
    if part:
        return invalid(
            f"tensor {name} belongs to whole heads, but {CONFIG_NAME} makes the folder a private "
            f"part of others: leave it out, or {private.SHARED_FIELD} and {private.RANK_FIELD}"
        )
    return invalid(
        f"tensor {name} belongs to a private part of heads, but {CONFIG_NAME} has no "
        f"{private.SHARED_FIELD} and {private.RANK_FIELD}, which say of which heads"
    )


def _acceptance(config: Mapping[str, object]) -> str:
    value = config.get(ACCEPTANCE_FIELD)
    if value is None:
        return ""
    text = json.dumps(value)
    if not isinstance(value, dict) or len(text) > MAX_ACCEPTANCE:
        raise invalid(
            f"{ACCEPTANCE_FIELD} in {CONFIG_NAME} must be an object as `lorastack train eval` "
            f"writes it, of at most {MAX_ACCEPTANCE} characters: leave it out for the default"
        )
    return text


def _expected(
    num_heads: int, num_layers: int, version: int, shapes: ModelShapes
) -> dict[str, tuple[TensorKey, tuple[int, ...]]]:
    """Tensor name -> (key, shape) of every tensor that the heads must have."""
    hidden = shapes.hidden_size
    expected: dict[str, tuple[TensorKey, tuple[int, ...]]] = {}
    for head in range(num_heads):
        for block in range(num_layers):
            layer = head_block(head, block, num_heads)
            name = f"{head}.{block}.linear"
            expected[f"{name}.weight"] = (layer, HEADS, Part.WEIGHT), (hidden, hidden)
            expected[f"{name}.bias"] = (layer, HEADS, Part.BIAS), (hidden,)
        if version == 1:
            key = (head, HEADS, Part.OUTPUT)
            expected[f"{head}.{num_layers}.weight"] = key, (shapes.vocab_size, hidden)
    return expected


def _version(config: Mapping[str, object], entries: Mapping[str, TensorEntry]) -> int:
    """1 or 2 by the tensors; raises if the config differs. A config without a version says 1."""
    stated = config.get("version")
    text = "1" if stated is None else str(stated).removesuffix(".0")
    if text not in ("1", "2") or isinstance(stated, bool):
        raise unsupported(f"version = {str(stated)[:64]!r} in {CONFIG_NAME} is not 1 or 2")
    outputs = sorted(name for name in entries if ".linear." not in name)
    actual = "1" if outputs else "2"
    if actual != text:
        shown = "has no version, which means 1" if stated is None else f"says version {text}"
        has = f"holds {outputs[0]}" if outputs else "holds no output matrices"
        raise invalid(
            f"{CONFIG_NAME} {shown}, but the folder {has}, as version {actual} does: "
            f'set "version": "{actual}" if the tensors are right'
        )
    return int(actual)


def _count(config: Mapping[str, object], field: str, limit: int, default: int | None = None) -> int:
    value = config.get(field, default)
    if type(value) is not int or not 1 <= value <= limit:
        rule = f"a whole number from 1 to {limit}"
        raise invalid(f"{field} = {ascii(value)[:64]} in {CONFIG_NAME} must be {rule}")
    return value


def _draft_vocabulary(path: Path, shapes: ModelShapes) -> tuple[int, ...]:
    """The ids in the file: at least as many as a tree may ask of a head, MAX_RANK."""
    entries = read_header(path, VOCABULARY_NAME, INTEGERS)
    if entries.keys() != {VOCABULARY_TENSOR}:
        raise invalid(f"{VOCABULARY_NAME} must hold one tensor, {VOCABULARY_TENSOR}")
    entry = entries[VOCABULARY_TENSOR]
    least = min(MAX_RANK, shapes.vocab_size)
    most = min(MAX_DRAFT_VOCABULARY, shapes.vocab_size)
    if len(entry.shape) != 1 or not least <= entry.shape[0] <= most:
        raise invalid(
            f"tensor {VOCABULARY_TENSOR} has shape {list(entry.shape)}: it must be a list of "
            f"{least} to {most} token ids"
        )
    dtype = {"I32": "<i4", "I64": "<i8"}[entry.dtype]
    ids_N = np.fromfile(path, dtype, entry.shape[0], offset=entry.offset)
    if ids_N[0] < 0 or ids_N[-1] >= shapes.vocab_size or bool((ids_N[1:] <= ids_N[:-1]).any()):
        raise invalid(
            f"tensor {VOCABULARY_TENSOR} must hold rising token ids, each once, from 0 to "
            f"{shapes.vocab_size - 1}: sort them"
        )
    return tuple(ids_N.tolist())
