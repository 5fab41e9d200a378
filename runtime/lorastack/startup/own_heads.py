"""Heads that a Medusa-2 checkpoint has beside its backbone, as the folder of a Medusa adapter.

Their tensors are `medusa_head.{i}.{l}.linear.weight` and so on; without the prefix these are the
names of published heads (`adapters.formats.medusa`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lorastack.adapters.formats.medusa import CONFIG_NAME, HEADS_FIELD, LAYERS_FIELD
from lorastack.adapters.formats.refusal import invalid
from lorastack.adapters.sources.base import PIECE, Pieces, SourceFile, describe
from lorastack.folders import HEADS_WEIGHTS
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.weights import HEADS_TENSORS_PREFIX
from lorastack.tensorheader import TensorEntry, header_bytes


def own_heads(
    checkpoint: Checkpoint, fields: Mapping[str, Any], base_model: str
) -> list[SourceFile]:
    """The files; [] for a checkpoint without heads.

    fields: of the model's config.json, what it says of the heads. base_model: what the files say
    they were made for. Reads the heads' bytes once, for their digest. The same checkpoint gives the
    same files.
    """
    tensors = [
        replace(stored, name=name.removeprefix(HEADS_TENSORS_PREFIX))
        for name, stored in sorted(checkpoint.tensors.items())
        if name.startswith(HEADS_TENSORS_PREFIX)
    ]
    if not tensors:
        return []
    config = {
        **{field: fields[field] for field in (HEADS_FIELD, LAYERS_FIELD) if field in fields},
        "base_model_name_or_path": base_model,
        "version": "2" if all(".linear." in stored.name for stored in tensors) else "1",
    }
    return [
        _file(CONFIG_NAME, json.dumps(config, indent=2).encode(), []),
        _file(HEADS_WEIGHTS, header_bytes(tensors), tensors),
    ]


def _file(name: str, begin: bytes, tensors: Sequence[TensorEntry]) -> SourceFile:
    read = partial(_pieces, begin, tensors)
    size = len(begin) + sum(stored.nbytes for stored in tensors)
    return SourceFile(spec=describe(name, size, read(0), lambda: None), read=read)


def _pieces(begin: bytes, tensors: Sequence[TensorEntry], offset: int) -> Pieces:
    """`begin` and then the tensors' bytes, from an offset on."""
    if offset < len(begin):
        yield begin[offset:]
    offset = max(0, offset - len(begin))
    for stored in tensors:
        with stored.path.open("rb") as file:
            file.seek(stored.offset + offset)
            left = max(0, stored.nbytes - offset)
            while left:
                if not (piece := file.read(min(PIECE, left))):
                    raise invalid(f"{stored.path} was cut short while its heads were read")
                yield piece
                left -= len(piece)
        offset = max(0, offset - stored.nbytes)
