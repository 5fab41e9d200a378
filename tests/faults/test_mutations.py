"""Mutated uploads: a status each, never a crash, never a stored half.

LORASTACK_MUTATIONS: how many to try.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.store.registry import Registry
from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.kernels.packing import allocate
from lorastack.service.edge.status import to_status
from tests.adapters.folders import SHAPES, read_folder, send, specs_of
from tests.faults.mutations import Folder, mutated
from tests.faults.store_files import assert_tidy, assert_whole
from tests.helpers.adapters import write_heads, write_lora

NUM_MUTATIONS = int(os.environ.get("LORASTACK_MUTATIONS", "500"))
REFUSALS = (InvalidArgumentError, FailedPreconditionError)
MAX_STATUS = 6 << 10  # bytes; it travels in trailers, which gRPC limits to 8 KiB, in base64
MAX_MANIFEST = 8 << 10  # bytes; what listing an adapter may cost


def base_weight(name: str) -> Tensor:
    return torch.zeros(SHAPES.vocab_size, SHAPES.hidden_size)


def zero_rows(ids: Sequence[int], out_NH: Tensor) -> None:
    out_NH.zero_()


TOKENS = {"<s>": 1, "</s>": 2}
VALIDATE = Validator(
    shapes=SHAPES, base_names=("tiny",), base_weight=base_weight, base_token=TOKENS.get
)


@dataclass(frozen=True)
class Store:
    """A store, and what the server would do with it."""

    registry: Registry
    root: Path
    load: Loader

    def listed(self) -> dict[str, str]:
        return {record.id: record.digest for record in self.registry.list()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    root = tmp_path / "store"
    registry = Registry(root, max_upload=4 << 20)
    load = Loader(
        registry=registry,
        shapes=SHAPES,
        allocate=partial(allocate, dtype=torch.float32),
        head_rows=zero_rows,
    )
    yield Store(registry, root, load)
    registry.close()


@pytest.fixture
def folders(tmp_path: Path) -> list[Folder]:
    """Adapters of every kind, all of them valid."""
    base: dict[str, Any] = {"base_model_name_or_path": "org/tiny"}
    hidden = SHAPES.hidden_size
    written = [
        write_lora(tmp_path / "lora", SHAPES, rank=2, **base),
        write_lora(
            tmp_path / "wide",
            SHAPES,
            rank=1,
            targets=("embed_tokens", "lm_head", "q_proj"),
            dtype=torch.float64,
            use_rslora=True,
            rank_pattern={"q_proj": 1},
        ),
        write_heads(tmp_path / "heads", hidden, num_heads=2, **base),
        write_heads(tmp_path / "v1", hidden, num_heads=1, num_blocks=2, vocab_size=32),
        write_heads(
            write_lora(tmp_path / "both", SHAPES, rank=1),
            hidden,
            dtype=torch.bfloat16,
            draft_vocabulary=range(32),
        ),
    ]
    contents = [read_folder(folder) for folder in written]
    contents[0]["chat_template.jinja"] = b"{{ messages }}"
    contents[2]["tokenizer.json"] = b'{"added_tokens": [{"id": 1, "content": "<s>"}], "model": {}}'
    contents[3]["added_tokens.json"] = b'{"</s>": 2, "<pad>": 32}'
    contents[1]["tokenizer_config.json"] = b'{"chat_template": "{{ messages }}"}'
    return contents


def attempt(store: Store, adapter_id: str, folder: Folder) -> str:
    """Uploads it; the digest."""
    upload = store.registry.begin_upload(adapter_id, specs_of(folder))
    try:
        send(upload, list(folder.values()))
        return upload.commit(VALIDATE, base_fingerprint="base").digest
    finally:
        upload.abort()


@pytest.mark.timeout(1800)
def test_mutated_uploads(store: Store, folders: list[Folder]) -> None:
    for number, folder in enumerate(folders):
        store.load(attempt(store, f"good-{number}", folder))
    before = store.listed()
    outcomes = {"accepted": 0, "refused": 0}

    @settings(
        max_examples=NUM_MUTATIONS,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(mutated(folders))
    def try_one(folder: Folder) -> None:
        try:
            digest = attempt(store, "mutant", folder)
        except REFUSALS as refusal:
            outcomes["refused"] += 1
            assert refusal.message
            assert to_status(refusal, "id").ByteSize() < MAX_STATUS
        else:
            outcomes["accepted"] += 1
            try:  # what is accepted can be served
                assert len(store.registry.manifest(digest).to_bytes()) < MAX_MANIFEST
                assert store.load(digest).buffer.isfinite().all()
                assert_whole(store.root)
            finally:
                store.registry.delete("mutant")
        assert store.listed() == before
        assert_tidy(store.root)

    try_one()
    assert min(outcomes.values()) > NUM_MUTATIONS // 50, outcomes
