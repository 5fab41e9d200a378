"""Heads that a Medusa-2 checkpoint has beside its backbone, as the folder of a Medusa adapter.

Their tensors are `medusa_head.{i}.{l}.linear.weight` and so on: without the prefix, the names that
published heads have (`adapters.formats.medusa`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lorastack.adapters.formats.medusa import CONFIG_NAME, HEADS_FIELD, LAYERS_FIELD
from lorastack.adapters.formats.refusal import invalid
from lorastack.adapters.sources.base import PIECE, Pieces, SourceFile, describe
from lorastack.model.checkpoint import Checkpoint, StoredTensor
from lorastack.model.weights import HEADS_PREFIX

WEIGHTS_NAME = "medusa_lm_head.safetensors"


def own_heads(
    checkpoint: Checkpoint, fields: Mapping[str, Any], base_model: str
) -> list[SourceFile]:
    """The files; [] for a checkpoint without heads.

    fields: of the model's config.json, what it says of the heads. base_model: what the files say
    they were made for. Reads the heads' bytes once, for their digest. The same checkpoint gives the
    same files.
    """
    tensors = {
        name.removeprefix(HEADS_PREFIX): stored
        for name, stored in sorted(checkpoint.tensors.items())
        if name.startswith(HEADS_PREFIX)
    }
    if not tensors:
        return []
    config = {
        **{field: fields[field] for field in (HEADS_FIELD, LAYERS_FIELD) if field in fields},
        "base_model_name_or_path": base_model,
        "version": "2" if all(".linear." in name for name in tensors) else "1",
    }
    return [
        _file(CONFIG_NAME, json.dumps(config, indent=2).encode(), {}),
        _file(WEIGHTS_NAME, _header(tensors), tensors),
    ]


def _file(name: str, begin: bytes, tensors: Mapping[str, StoredTensor]) -> SourceFile:
    read = partial(_pieces, begin, list(tensors.values()))
    size = len(begin) + sum(stored.end - stored.start for stored in tensors.values())
    return SourceFile(spec=describe(name, size, read(0), lambda: None), read=read)


def _header(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Of a safetensors file that holds the tensors one after the other."""
    table: dict[str, Any] = {}
    end = 0
    for name, stored in tensors.items():
        start, end = end, end + stored.end - stored.start
        table[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def _pieces(begin: bytes, tensors: list[StoredTensor], offset: int) -> Pieces:
    """`begin` and then the tensors' bytes, from an offset on."""
    if offset < len(begin):
        yield begin[offset:]
    offset = max(0, offset - len(begin))
    for stored in tensors:
        size = stored.end - stored.start
        with stored.file.open("rb") as file:
            file.seek(stored.start + offset)
            left = max(0, size - offset)
            while left:
                if not (piece := file.read(min(PIECE, left))):
                    raise invalid(f"{stored.file} was cut short while its heads were read")
                yield piece
                left -= len(piece)
        offset = max(0, offset - size)
