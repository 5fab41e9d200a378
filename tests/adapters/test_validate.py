"""What an upload must pass: its base model, its values, its copies of base weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.registry import Registry
from lorastack.errors import FailedPreconditionError, InvalidArgumentError, LorastackError
from tests.adapters.folders import SHAPES, VALIDATE, files_of, read_folder, store
from tests.helpers.adapters import write_lora
from tests.helpers.packed import read_tensors


def test_another_base_model_stores_nothing(registry: Registry, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, base_model_name_or_path="org/other")
    with pytest.raises(FailedPreconditionError, match="org/other"):
        store(registry, "a", read_folder(folder), validate=VALIDATE)
    assert registry.list() == []


def test_values_are_checked_before_an_upload_is_accepted(
    registry: Registry, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, strength=float("inf"))
    with pytest.raises(InvalidArgumentError, match=r"lora_B\.weight contains NaN"):
        store(registry, "a", read_folder(folder), validate=VALIDATE)
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
