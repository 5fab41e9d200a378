"""Folders of Medusa heads: reading any, writing those that were trained.

Written is the published version 2 layout in bfloat16: `config.json` and, for head k and block l,
`{k}.{l}.linear.weight` [H, H] and `.bias` [H] in `medusa_lm_head.safetensors`. Beside it lie our
extra files: the draft vocabulary, a model card, the evaluation and its plot. A private part has
`{k}.{l}.linear.lora_A.weight` [R, H] and `.lora_B.weight` [H, R] in their place, and names the
shared heads that it corrects; their draft vocabulary is its own where it brings none.

A folder is written beside its place and renamed: it is there whole, or not at all.

Shape suffixes: H hidden, V vocabulary, N tokens to choose from, R rank.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorastack.adapters.formats.facts import Facts, SharedHeads
from lorastack.adapters.formats.medusa import (
    CONFIG_NAME,
    HEADS_FIELD,
    LAYERS_FIELD,
    VOCABULARY_NAME,
    VOCABULARY_TENSOR,
)
from lorastack.adapters.formats.parse import parse
from lorastack.adapters.formats.private import RANK_FIELD, SHARED_FIELD
from lorastack.adapters.store.durable import disk_full_is_exhaustion, sync_folder
from lorastack.errors import AlreadyExistsError, InvalidArgumentError, Reason
from lorastack.folders import HEADS_WEIGHTS, belongs
from lorastack.layout import HEADS, ModelShapes, Part, head_block
from lorastack.tensorheader import TensorEntry
from lorastack.train.heads import Block, MedusaHeads, PrivateBlock

__all__ = ["HeadsFolder", "SharedHeads", "json_bytes", "load_heads", "stored", "write_heads"]

CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
PLOT_NAME = "plot.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsFolder:
    """What a folder holds: blocks in float32, the outputs of version 1 as they are.

    ids_N: int64; None where heads choose from all tokens.
    """

    heads: MedusaHeads
    ids_N: Tensor | None


def load_heads(folder: Path, shapes: ModelShapes, shared: HeadsFolder | None = None) -> HeadsFolder:
    """The heads of a folder of any origin, version 1 or 2, or of a bundle.

    shapes: of the base model. shared: what a private part corrects; the result is both together.
    Raises InvalidArgumentError as an upload of the folder would, and for a private part without its
    shared heads.
    """
    parsed = parse(_files(folder), shapes)
    facts = parsed.facts
    if not facts.num_heads:
        raise InvalidArgumentError(
            f"{folder} holds no Medusa heads: name a folder of heads", reason=Reason.INVALID_ADAPTER
        )

    def tensor(head: int, number: int, part: Part) -> Tensor:
        return _read(parsed.tensors[head_block(head, number, facts.num_heads), HEADS, part])

    def block(head: int, number: int) -> Block:
        if facts.shared_heads is None:
            weight_HH, bias_H = (tensor(head, number, part) for part in (Part.WEIGHT, Part.BIAS))
            return Block(weight_HH.float(), bias_H.float())
        assert shared is not None
        corrected = shared.heads.heads[head][number]
        a_RH, b_HR = (tensor(head, number, part) for part in (Part.A, Part.B))
        private = PrivateBlock(a_RH.float(), b_HR.float())
        return Block(corrected.weight_HH, corrected.bias_H, private)

    if facts.shared_heads is not None:
        _check_shared(folder, facts, shared)
    outputs = range(facts.num_heads) if facts.medusa_version == 1 else ()
    heads = MedusaHeads(
        tuple(tuple(block(k, n) for n in range(facts.num_layers)) for k in range(facts.num_heads)),
        tuple(_read(parsed.tensors[head, HEADS, Part.OUTPUT]) for head in outputs),
    )
    ids_N = torch.tensor(parsed.draft_vocabulary) if parsed.draft_vocabulary else None
    if ids_N is None and shared is not None and facts.shared_heads is not None:
        ids_N = shared.ids_N
    return HeadsFolder(heads=heads, ids_N=ids_N)


def _check_shared(folder: Path, facts: Facts, shared: HeadsFolder | None) -> None:
    """Raises InvalidArgumentError unless the private part's shared heads are at hand."""
    assert facts.shared_heads is not None
    if shared is None:
        raise InvalidArgumentError(
            f"{folder} holds a private part of {facts.shared_heads.id}: it goes with these heads",
            reason=Reason.INVALID_ADAPTER,
        )
    found = shared.heads.num_heads, shared.heads.num_layers
    if found != (facts.num_heads, facts.num_layers):
        raise InvalidArgumentError(
            f"{folder} corrects {facts.num_heads} heads of {facts.num_layers} blocks, but "
            f"{facts.shared_heads.id} has {found[0]} of {found[1]}: name the heads it was made for",
            reason=Reason.INVALID_ADAPTER,
        )


def stored(heads: MedusaHeads) -> MedusaHeads:
    """What is read again of heads that are written: float32, each learnt number rounded to
    bfloat16. Measure these."""
    copy = heads.to_host()
    for tensor in copy.learnt().values():
        tensor.copy_(tensor.bfloat16())
    return copy


def write_heads(
    target: Path,
    heads: MedusaHeads,
    *,
    base_model: str,
    ids_N: Tensor | None = None,
    shared: SharedHeads | None = None,
    fields: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> None:
    """Writes what the heads have learnt: all of them, or their private part with `shared`.

    ids_N: the draft vocabulary that they bring, rising; None for none. fields: more of config.json.
    files: further files by name. Raises AlreadyExistsError for a target that is there and not an
    empty folder, unless `replace`; ResourceExhaustedError STORE_FULL.
    """
    weights = {name: t.bfloat16().contiguous() for name, t in heads.to_host().learnt().items()}
    config: dict[str, Any] = {
        HEADS_FIELD: heads.num_heads,
        LAYERS_FIELD: heads.num_layers,
        "base_model_name_or_path": base_model,
        "version": "2",
    }
    if shared is not None:
        config[SHARED_FIELD] = {"id": shared.id, "sha256": shared.sha256}
        config[RANK_FIELD] = heads.private_rank
    contents = {
        HEADS_WEIGHTS: save(weights, {"format": "pt"}),
        CONFIG_NAME: json_bytes(config | dict(fields or {})),
        **(files or {}),
    }
    if ids_N is not None:
        ids = {VOCABULARY_TENSOR: ids_N.to("cpu", torch.int32).contiguous()}
        contents[VOCABULARY_NAME] = save(ids)
    with (
        disk_full_is_exhaustion(f"no room to write {target}: free some space and try again"),
        _new_folder(target.resolve(), replace) as staged,
    ):
        for name, data in contents.items():
            with (staged / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(staged)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


@contextmanager
def _new_folder(target: Path, replace: bool) -> Iterator[Path]:
    """Yields an empty folder, which becomes `target` when the block ends; no trace if it raises."""
    there = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if there and not (replace and target.is_dir()):
        raise AlreadyExistsError(
            f"{target} is there already: name another folder, or ask for it to be replaced"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staged, old = (target.parent / f".{target.name}.{uuid.uuid4().hex}" for _ in range(2))
    staged.mkdir()
    try:
        yield staged
        if there:
            target.rename(old)
        try:
            staged.rename(target)
        except OSError:
            if there:
                old.rename(target)
            raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> dict[str, Path]:
    """An adapter's files by name. Raises InvalidArgumentError if there is no such folder."""
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is no folder: name one that holds Medusa heads")
    return {path.name: path for path in sorted(folder.iterdir()) if belongs(path.name)}


def _read(entry: TensorEntry) -> Tensor:
    with safe_open(entry.path, "pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor
