"""Medusa heads: config.json with medusa_num_heads, and one residual block a head (version 2).

Version 2: `{i}.0.linear.weight [H, H]`, `{i}.0.linear.bias [H]` for head i (0-based); the base
model's lm_head gives the logits. Version 1 heads bring output matrices, `{i}.1.weight [V, H]`.
`version` is never trusted alone: the tensors decide; a folder where the two disagree is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorastack.adapters.peft import text_field
from lorastack.adapters.refusal import invalid, unsupported
from lorastack.adapters.tensorfile import TensorEntry
from lorastack.errors import Reason, UnimplementedError
from lorastack.layout import HEADS, MAX_RANK, ModelShapes, Part, TensorKey

CONFIG_NAME = "config.json"
HEADS_FIELD = "medusa_num_heads"
MAX_HEADS = 32
MAX_CHOICES = 1024
_TENSOR = re.compile(
    r"(?P<head>0|[1-9]\d{0,3})\.(?P<block>0|[1-9]\d{0,3})\.(?P<kind>linear\.weight|linear\.bias|weight)"
)
_PARTS = {"linear.weight": Part.WEIGHT, "linear.bias": Part.BIAS}

Choices = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsPart:
    """The Medusa heads of a folder."""

    base_model: str  # "" if the config names none
    num_heads: int
    num_layers: int
    version: int
    choices: Choices  # the heads' own tree, in order of worth; () for none
    tensors: Mapping[TensorKey, TensorEntry]


def is_heads_tensor(name: str) -> bool:
    return _TENSOR.fullmatch(name) is not None


def parse_medusa(
    config: Mapping[str, object], entries: Mapping[str, TensorEntry], shapes: ModelShapes
) -> HeadsPart:
    """The heads of a folder. `entries`: its heads' tensors by name.

    Raises InvalidArgumentError naming the field, or the tensor and both shapes; UnimplementedError
    for version 1 heads.
    """
    num_heads = _count(config, HEADS_FIELD, MAX_HEADS)
    num_layers = _count(config, "medusa_num_layers", MAX_HEADS, default=1)
    _check_version(config, entries)
    if num_layers != 1:
        raise unsupported(f"medusa_num_layers is {num_layers}; only 1 is supported")
    hidden = shapes.hidden_size
    tensors: dict[TensorKey, TensorEntry] = {}
    for name, entry in entries.items():
        match = _TENSOR.fullmatch(name)
        assert match is not None, name
        head = int(match["head"])
        if head >= num_heads:
            raise invalid(f"tensor {name} belongs to a head beyond {HEADS_FIELD} = {num_heads}")
        if match["block"] != "0":
            raise unsupported(f"tensor {name}: heads of more than one block are not supported")
        part = _PARTS[match["kind"]]
        shape = (hidden, hidden) if part is Part.WEIGHT else (hidden,)
        if entry.shape != shape:
            raise invalid(
                f"tensor {name} has shape {list(entry.shape)}, "
                f"but the base model's hidden size needs {list(shape)}"
            )
        tensors[head, HEADS, part] = entry
    for head in range(num_heads):
        for kind, part in _PARTS.items():
            if (head, HEADS, part) not in tensors:
                raise invalid(f"{HEADS_FIELD} is {num_heads}, but {head}.0.{kind} is missing")
    return HeadsPart(
        base_model=text_field(config, "base_model_name_or_path"),
        num_heads=num_heads,
        num_layers=num_layers,
        version=2,
        choices=_choices(config.get("medusa_choices"), num_heads, shapes.vocab_size),
        tensors=tensors,
    )


def _check_version(config: Mapping[str, object], entries: Mapping[str, TensorEntry]) -> None:
    """Version 1 or 2 by tensors, against what the config says (missing: 1)."""
    stated = config.get("version")
    text = "1" if stated is None else str(stated).removesuffix(".0")
    if text not in ("1", "2") or isinstance(stated, bool):
        raise unsupported(f"version = {str(stated)[:64]!r} in {CONFIG_NAME} is not 1 or 2")
    outputs = sorted(name for name in entries if not name.split(".", 2)[2].startswith("linear"))
    actual = "1" if outputs else "2"
    if actual != text:
        shown = "has no version, which means 1" if stated is None else f"says version {text}"
        has = f"holds {outputs[0]}" if outputs else "holds no output matrices"
        raise invalid(
            f"{CONFIG_NAME} {shown}, but the folder {has}, as version {actual} does: "
            f'set "version": "{actual}" if the tensors are right'
        )
    if outputs:
        raise UnimplementedError(
            f"Medusa version 1 heads (with output matrices such as {outputs[0]}) are not "
            "implemented: use version 2 heads",
            reason=Reason.NOT_IMPLEMENTED,
        )


def _count(config: Mapping[str, object], field: str, limit: int, default: int | None = None) -> int:
    value = config.get(field, default)
    if type(value) is not int or not 1 <= value <= limit:
        raise invalid(f"{field} = {str(value)[:64]} in {CONFIG_NAME} must be from 1 to {limit}")
    return value


def _choices(value: object, num_heads: int, vocab_size: int) -> Choices:
    """The optional medusa_choices: distinct paths no deeper than the heads, with every prefix."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_CHOICES:
        raise invalid(f"medusa_choices must be a list of at most {MAX_CHOICES} paths")
    max_rank = min(MAX_RANK, vocab_size)
    for path in value:
        ranks = path if isinstance(path, list) and path else [-1]
        if not all(type(rank) is int and 0 <= rank < max_rank for rank in ranks):
            raise invalid(
                f"medusa_choices: {str(path)[:64]} is not a path of ranks below {max_rank}"
            )
        if len(path) > num_heads:
            raise invalid(f"medusa_choices: {path} is deeper than the {num_heads} heads")
    paths = tuple(tuple(path) for path in value)
    known = set(paths)
    if len(known) != len(paths):
        raise invalid("medusa_choices names a path twice")
    for path in paths:
        if len(path) > 1 and path[:-1] not in known:
            raise invalid(f"medusa_choices: {list(path)} lacks its prefix {list(path[:-1])}")
    return paths
