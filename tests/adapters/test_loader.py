"""From stored files to a packed adapter, and what can happen to the bytes in between."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorastack.adapters.formats.parse import parse
from lorastack.adapters.memory import arena
from lorastack.adapters.memory import loader as loader_module
from lorastack.adapters.memory.arena import DeviceArena
from lorastack.adapters.memory.fill import fill
from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig
from lorastack.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
)
from lorastack.kernels import packing
from lorastack.layout import (
    DRAFT_KEY,
    AdapterKind,
    AdapterLayout,
    ModelShapes,
    TensorKey,
    TensorSlot,
)
from lorastack.startup import engine
from lorastack.startup.model import LoadedModel
from tests.adapters.folders import SHAPES, VALIDATE, files_of, read_folder, store
from tests.helpers.adapters import write_heads
from tests.helpers.streams import FakeDevice


def allocate(
    shapes: Mapping[TensorKey, tuple[int, ...]],
    scales: Mapping[tuple[int, str], float],
    num_heads: int,
    draft_vocabulary: tuple[int, ...],
) -> tuple[AdapterLayout, Tensor]:
    """One tensor after the other, in float32, the last one first."""
    slots: dict[TensorKey, TensorSlot] = {}
    end = 0
    for key, shape in reversed(shapes.items()):
        slots[key] = TensorSlot(end, shape)
        end += math.prod(shape)
    layout = AdapterLayout(
        slots=slots,
        scales=scales,
        num_elements=end,
        itemsize=4,
        num_heads=num_heads,
        draft_vocabulary=draft_vocabulary,
    )
    return layout, torch.full((end,), torch.nan)


def head_rows(ids: Sequence[int], out_NH: Tensor) -> None:
    """Row i of lm_head holds 100 + i everywhere."""
    out_NH[:] = 100.0 + torch.tensor(ids)[:, None]


def loader(registry: Registry, shapes: ModelShapes = SHAPES) -> Loader:
    return Loader(registry=registry, shapes=shapes, allocate=allocate, head_rows=head_rows)


def upload(registry: Registry, adapter_id: str, contents: Mapping[str, bytes]) -> str:
    return store(registry, adapter_id, contents, validate=VALIDATE).digest


def test_from_folder_to_buffer(registry: Registry, bundle: Path, medusa_version: int) -> None:
    digest = upload(registry, "a", read_folder(bundle))
    facts = registry.manifest(digest).facts
    assert facts.kind is AdapterKind.LORA_WITH_MEDUSA
    assert (facts.rank, facts.num_heads, facts.num_layers) == (3, 2, 2)
    assert facts.medusa_version == medusa_version
    packed = loader(registry)(digest)
    assert packed.digest == digest
    assert packed.nbytes == packed.buffer.numel() * 4
    stored = load_file(bundle / "adapter_model.safetensors")
    stored |= load_file(bundle / "medusa_lm_head.safetensors")
    entries = parse(files_of(bundle), SHAPES).tensors
    assert len(entries) == len(stored)
    assert packed.layout.slots.keys() - {DRAFT_KEY} == entries.keys()
    for key in entries:
        slot = packed.layout.slots[key]
        expected = stored[entries[key].name].float()
        found = packed.buffer[slot.offset : slot.offset + expected.numel()]
        assert torch.equal(found.reshape(slot.shape), expected)


def test_a_draft_vocabulary_brings_rows_of_lm_head(tmp_path: Path, registry: Registry) -> None:
    """Beside the heads in one buffer, whose bytes are counted."""
    ids = range(SHAPES.vocab_size)
    plain = read_folder(write_heads(tmp_path / "x", SHAPES.hidden_size))
    drafting = read_folder(write_heads(tmp_path / "x", SHAPES.hidden_size, draft_vocabulary=ids))
    digests = [upload(registry, name, files) for name, files in (("a", plain), ("b", drafting))]
    assert digests[0] != digests[1]
    without, packed = (loader(registry)(digest) for digest in digests)
    assert without.layout.draft_vocabulary == ()
    assert packed.layout.draft_vocabulary == tuple(ids)
    slot = packed.layout.slots.pop(DRAFT_KEY)  # type: ignore[attr-defined]
    assert packed.layout.slots.keys() == without.layout.slots.keys()
    assert slot.shape == (len(ids), SHAPES.hidden_size)
    assert packed.nbytes == without.nbytes + math.prod(slot.shape) * 4
    rows_NH = packed.buffer[slot.offset :][: math.prod(slot.shape)].view(slot.shape)
    assert torch.equal(rows_NH, (100.0 + torch.tensor(ids))[:, None].expand_as(rows_NH))


def test_a_gpu_copy_has_the_bytes_of_a_load(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through page-locked memory, its end gathered on the device, on a GPU that is made up."""
    ids = range(SHAPES.vocab_size)
    heads = read_folder(write_heads(tmp_path / "x", SHAPES.hidden_size, draft_vocabulary=ids))
    digest = upload(registry, "a", heads)
    device = FakeDevice(lazy=True)
    cpu = torch.device("cpu")
    monkeypatch.setattr(engine, "DeviceArena", lambda n, _, streams: DeviceArena(n, cpu, streams))
    monkeypatch.setattr(arena, "_page_locked", lambda n: torch.zeros(n, dtype=torch.uint8))
    backend = SimpleNamespace(
        device=torch.device("cuda"),
        dtype=torch.float32,
        shapes=SHAPES,
        head_rows=head_rows,
        adopt=lambda lora: None,
    )
    limits = AdapterConfig(store=tmp_path, device_memory=1 << 16, host_memory=1 << 16)
    model = cast(LoadedModel, SimpleNamespace(backend=backend))
    host, pool = engine.adapter_memory(model, limits, registry, lambda: None, device.streams)
    while (found := pool.acquire([digest])) is None:
        pool.poll()
        time.sleep(0.001)
    (adapter,) = found
    pool.close()
    plain = replace(loader(registry), allocate=partial(packing.allocate, dtype=torch.float32))
    whole = plain(digest).buffer
    assert adapter.nbytes % packing.UNIT == 0
    assert torch.equal(adapter.buffer[: len(whole)], whole)
    assert host.snapshot()[digest] == adapter.layout.slots[DRAFT_KEY].offset * 4 < adapter.nbytes


def test_a_load_of_damaged_bytes_says_so(registry: Registry, bundle: Path) -> None:
    digest = upload(registry, "a", read_folder(bundle))
    load_adapter = loader(registry)
    for path in registry.files(digest).values():
        whole = path.read_bytes()
        last = bytes([whole[-1] ^ 1])
        # Bytes that are parsed, bytes that are not, too few, too many, none.
        for damaged in (b"?" + whole[1:], whole[:-1] + last, whole[:-1], whole + b"\n", b""):
            path.write_bytes(damaged)
            with pytest.raises(DataLossError, match=path.name):
                load_adapter(digest)
        path.unlink()
        with pytest.raises(DataLossError, match=path.name):
            load_adapter(digest)
        path.write_bytes(whole)
        load_adapter(digest)
    registry.delete("a")
    with pytest.raises(NotFoundError):
        load_adapter(digest)


def test_the_same_adapter_is_uploaded_during_a_load(
    registry: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a README, and its files in another order."""
    files = read_folder(bundle)
    digest = upload(registry, "a", files)

    def fill_late(*args: Any) -> list[str]:
        again = {"README.md": b"#", **dict(reversed(files.items()))}
        assert upload(registry, "b", again) == digest
        return fill(*args)

    monkeypatch.setattr(loader_module, "fill", fill_late)
    assert loader(registry)(digest).digest == digest


def test_a_load_for_another_base_model(registry: Registry, bundle: Path) -> None:
    """Intact bytes that do not fit the server's model are no damage."""
    digest = upload(registry, "a", read_folder(bundle))
    other = replace(SHAPES, hidden_size=SHAPES.hidden_size * 2)
    with pytest.raises(InvalidArgumentError, match="shape"):
        loader(registry, other)(digest)
