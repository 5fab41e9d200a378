"""Adapter folders and uploads in few words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.formats.parse import ParsedAdapter, parse
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.manifest import FileSpec, Record
from lorastack.adapters.store.registry import Registry, Upload, Validate
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import AdapterKind, ModelShapes

SHAPES = ModelShapes(
    architecture="LlamaForCausalLM",
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=32,
    max_context=64,
    tie_word_embeddings=True,
)
LARGE = replace(SHAPES, vocab_size=20_000)
H = SHAPES.hidden_size
LORA_FILE, HEADS_FILE = "adapter_model.safetensors", "medusa_lm_head.safetensors"
LORA_CONFIG, HEADS_CONFIG = "adapter_config.json", "config.json"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Edit = Callable[[dict[str, torch.Tensor]], None]
FACTS = Facts(
    kind=AdapterKind.LORA,
    base_model="",
    rank=1,
    alpha=1.0,
    target_modules=("q_proj",),
    num_heads=0,
    num_layers=0,
    medusa_version=0,
)
ANYTHING = ParsedAdapter(
    facts=FACTS,
    base_models=(),
    draft_vocabulary=(),
    scales={},
    chat_template=None,
    tensors={},
    base_copies={},
)


def no_copies(name: str) -> torch.Tensor:
    raise AssertionError(f"asked for {name}")


VALIDATE = Validator(shapes=SHAPES, base_names=("tiny",), base_weight=no_copies)
# Adapters to the store: it looks at no byte of them.
ONE = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"one" * 100}
TWO = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"two" * 200}
BLOB = ONE["adapter_model.safetensors"]


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir())}


def parse_folder(folder: Path, shapes: ModelShapes = SHAPES) -> ParsedAdapter:
    return parse(files_of(folder), shapes)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(path: Path, edit: Edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refused(folder: Path, named: str) -> InvalidArgumentError:
    """named: an expression that its message matches."""
    with pytest.raises(InvalidArgumentError, match=named) as refusal:
        parse_folder(folder)
    assert refusal.value.reason in (Reason.INVALID_ADAPTER, Reason.UNSUPPORTED_ADAPTER)
    return refusal.value


def accept(files: Mapping[str, Path]) -> ParsedAdapter:
    """A validator that looks at nothing."""
    return ANYTHING


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def specs_of(contents: Mapping[str, bytes]) -> list[FileSpec]:
    return [
        FileSpec(name=name, size=len(data), sha256=sha256(data)) for name, data in contents.items()
    ]


def send(upload: Upload, blobs: Sequence[bytes], chunk: int = 1 << 20) -> None:
    """Writes whatever the store still needs of these."""
    for data in blobs:
        if sha256(data) in upload.needed:
            for offset in range(upload.staged[sha256(data)], len(data), chunk):
                upload.write(sha256(data), offset, data[offset : offset + chunk])


def store(
    registry: Registry,
    adapter_id: str,
    contents: Mapping[str, bytes],
    if_digest: str | None = None,
    *,
    validate: Validate = accept,
    base_fingerprint: str = "base",
) -> Record:
    """Uploads files, whatever they are unless `validate` looks."""
    upload = registry.begin_upload(adapter_id, specs_of(contents), if_digest)
    send(upload, list(contents.values()))
    return upload.commit(validate, base_fingerprint=base_fingerprint)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_of(folder).items()}


def reopen(registry: Registry, root: Path) -> Registry:
    registry.close()
    return Registry(root)


def contents(registry: Registry, reference: str) -> dict[str, bytes]:
    """All files of a revision."""
    return {f.name: registry.path(f).read_bytes() for f in registry.resolve(reference).files}


def blob_names(root: Path) -> set[str]:
    return set(os.listdir(root / "blobs" / "sha256"))


def staged(root: Path) -> list[str]:
    return os.listdir(root / "staging")
