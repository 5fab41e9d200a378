"""From an upload to a packed adapter, and what can happen to the bytes in between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorastack.adapters.formats.parse import parse
from lorastack.adapters.memory import loader as load
from lorastack.adapters.memory.fill import fill
from lorastack.adapters.memory.loader import Loader, Validator
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
)
from lorastack.layout import (
    DRAFT_KEY,
    AdapterKind,
    AdapterLayout,
    ModelShapes,
    TensorKey,
    TensorSlot,
)
from tests.adapters.folders import SHAPES, files_of, read_folder, send, specs_of
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.packed import read_tensors


def no_copies(name: str) -> Tensor:
    raise AssertionError(f"asked for {name}")


VALIDATE = Validator(shapes=SHAPES, base_names=("tiny",), base_weight=no_copies)


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


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "store")
    yield registry
    registry.close()


@pytest.fixture(params=[1, 2])
def medusa_version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def bundle(tmp_path: Path, medusa_version: int) -> Path:
    folder = write_lora(tmp_path / "bundle", SHAPES, rank=3, dtype=torch.bfloat16)
    return write_heads(
        folder,
        SHAPES.hidden_size,
        num_heads=2,
        num_blocks=2,
        vocab_size=SHAPES.vocab_size if medusa_version == 1 else None,
        draft_vocabulary=range(SHAPES.vocab_size) if medusa_version == 2 else (),
    )


def upload(registry: Registry, adapter_id: str, contents: Mapping[str, bytes]) -> str:
    upload = registry.begin_upload(adapter_id, specs_of(contents))
    send(upload, list(contents.values()))
    return upload.commit(VALIDATE, base_fingerprint="base").digest


def test_from_folder_to_buffer(registry: Registry, bundle: Path, medusa_version: int) -> None:
    digest = upload(registry, "a", read_folder(bundle))
    manifest = registry.manifest(digest)
    assert manifest.kind is AdapterKind.LORA_WITH_MEDUSA
    assert (manifest.rank, manifest.num_heads, manifest.num_layers) == (3, 2, 2)
    assert manifest.medusa_version == medusa_version
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

    monkeypatch.setattr(load, "fill", fill_late)
    assert loader(registry)(digest).digest == digest


def test_a_load_for_another_base_model(registry: Registry, bundle: Path) -> None:
    """Intact bytes that do not fit the server's model are no damage."""
    digest = upload(registry, "a", read_folder(bundle))
    other = replace(SHAPES, hidden_size=SHAPES.hidden_size * 2)
    with pytest.raises(InvalidArgumentError, match="shape"):
        loader(registry, other)(digest)


def test_another_base_model_stores_nothing(registry: Registry, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, base_model_name_or_path="org/other")
    with pytest.raises(FailedPreconditionError, match="org/other"):
        upload(registry, "a", read_folder(folder))
    assert registry.list() == []


def test_values_are_checked_before_an_upload_is_accepted(
    registry: Registry, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, strength=float("inf"))
    with pytest.raises(InvalidArgumentError, match=r"lora_B\.weight contains NaN"):
        upload(registry, "a", read_folder(folder))
    assert registry.list() == []


@pytest.mark.parametrize(
    ("stored", "served", "fits", "too_large"),
    [
        (torch.float32, torch.float16, 65519.0, -65520.0),
        (torch.bfloat16, torch.float16, -65280.0, 65536.0),
        (torch.float64, torch.float16, 65504.0, 1e300),
        (torch.float32, torch.bfloat16, 3.389e38, 3.402e38),
    ],
    ids=str,
)
def test_values_must_fit_in_what_the_server_computes_with(
    tmp_path: Path, stored: torch.dtype, served: torch.dtype, fits: float, too_large: float
) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, dtype=stored)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    last = max(tensors)
    validate = replace(VALIDATE, dtype=served)
    tensors[last].view(-1)[-1] = fits
    save_file(tensors, path)
    validate(files_of(folder))
    tensors[last].view(-1)[-1] = too_large
    save_file(tensors, path)
    with pytest.raises(InvalidArgumentError) as refusal:
        validate(files_of(folder))
    assert f"tensor {last} contains" in str(refusal.value)
    if stored is not torch.float64:
        VALIDATE(files_of(folder))  # float32 holds it


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_copies_of_base_weights(
    tmp_path: Path, base_dtype: torch.dtype, copy_dtype: torch.dtype
) -> None:
    """Compared piece by piece, either rounded to the other's dtype."""
    shapes = replace(SHAPES, vocab_size=6000)
    weight = torch.randn(6000, SHAPES.hidden_size).clamp(min=0.01).to(base_dtype)
    folder = write_lora(tmp_path / "x", shapes)
    path = folder / "adapter_model.safetensors"
    lora = load_file(path)
    validate = Validator(shapes=shapes, base_names=("tiny",), base_weight=lambda name: weight)

    def validate_with(copy: Tensor) -> None:
        save_file({**lora, "base_model.model.lm_head.weight": copy}, path)
        validate(files_of(folder))

    copy = weight.to(copy_dtype, copy=True)
    validate_with(copy)
    copy[-1, -1] += 1
    with pytest.raises(InvalidArgumentError, match=r"lm_head\.weight differs"):
        validate_with(copy)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_folders_are_refused_or_read_whole(bundle: Path, data: st.DataObject) -> None:
    """Any change to any file: a LorastackError, or an adapter that reads to the end."""
    contents = read_folder(bundle)
    name = data.draw(st.sampled_from(sorted(contents)))
    whole = bytearray(contents[name])
    # Headers and configs are where it hurts.
    place = data.draw(st.integers(0, min(len(whole), 4000) - 1))
    kind = data.draw(st.sampled_from(["flip", "splice", "cut"]))
    if kind == "flip":
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "splice":
        whole[place : place + data.draw(st.integers(0, 6))] = data.draw(
            st.sampled_from([b"null", b"[]", b"{}", b"-1", b"1e9", b'"', b"9999999999999999999"])
        )
    else:
        del whole[place:]
    path = bundle / name
    path.write_bytes(whole)
    try:
        parsed = VALIDATE(files_of(bundle))
        tensors = read_tensors(parsed)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    except LorastackError:
        pass
    finally:
        path.write_bytes(contents[name])
