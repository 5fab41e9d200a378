"""`lorastack adapters convert`: pickles become safetensors without running what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorastack.adapters.formats.parse import parse
from lorastack.layout import AdapterKind, ModelShapes
from tests.cli.conftest import Run
from tests.helpers.adapters import write_heads, write_lora

COMMAND = ("adapters", "convert")


def pickled(folder: Path, name: str) -> Path:
    """Replaces the folder's safetensors file by what torch.save writes; returns the folder."""
    weights = next(folder.glob("*.safetensors"))
    torch.save(load_file(weights), folder / name)
    weights.unlink()
    return folder


def test_a_peft_lora(run: Run, tmp_path: Path, shapes: ModelShapes) -> None:
    source = pickled(write_lora(tmp_path / "old", shapes), "adapter_model.bin")
    original = torch.load(source / "adapter_model.bin", weights_only=True)
    for name in ("README.md", "chat_template.jinja"):
        (source / name).write_text("kept")
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "events.log"):
        (source / name).write_bytes(b"trainer's")
    done = run(*COMMAND, str(source), str(tmp_path / "new"), "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["converted"] == {"adapter_model.bin": "adapter_model.safetensors"}
    assert sorted(said["left_out"]) == [
        *("events.log", "optimizer.pt", "rng_state_0.pth", "training_args.bin")
    ]
    files = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert sorted(files) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")
    ]
    assert parse(files, shapes).facts.kind is AdapterKind.LORA
    written = load_file(files["adapter_model.safetensors"])
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_medusa_heads(run: Run, tmp_path: Path, shapes: ModelShapes, dtype: torch.dtype) -> None:
    heads = write_heads(tmp_path / "old", shapes.hidden_size, dtype=dtype)
    source = pickled(heads, "medusa_lm_head.pt")
    done = run(*COMMAND, str(source), str(tmp_path / "new"))
    assert done.code == 0, done.err
    files = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert parse(files, shapes).facts.kind is AdapterKind.MEDUSA
    assert {t.dtype for t in load_file(files["medusa_lm_head.safetensors"]).values()} == {dtype}


def test_medusa_v1_with_shared_blocks(run: Run, tmp_path: Path) -> None:
    """The official code repeats one block, whose tensors then share their memory."""
    block, out = torch.randn(8, 8), torch.randn(32, 8).t().contiguous().t()
    tensors = {"0.0.linear.weight": block, "0.1.linear.weight": block, "0.2.weight": out}
    tensors["0.0.linear.bias"] = tensors["0.1.linear.bias"] = torch.nn.Parameter(torch.ones(8))
    source = tmp_path / "old"
    source.mkdir()
    (source / "config.json").write_text('{"medusa_num_heads": 1, "medusa_num_layers": 2}')
    torch.save(tensors, source / "medusa_lm_head.pt")
    done = run(*COMMAND, str(source), str(tmp_path / "new"))
    assert done.code == 0, done.err
    written = load_file(tmp_path / "new" / "medusa_lm_head.safetensors")
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_nothing_of_a_pickle_runs(run: Run, tmp_path: Path) -> None:
    source, mark = tmp_path / "old", tmp_path / "exploded"
    source.mkdir()
    torch.save({"a": torch.ones(1), "b": Bomb(mark)}, source / "adapter_model.bin")
    done = run(*COMMAND, str(source), str(tmp_path / "new"))
    assert done.code == 1
    assert "adapter_model.bin" in done.err
    assert "weights_only=False" not in done.err
    assert not mark.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize(
    "value",
    [[torch.ones(1)], {}, {"a": 1}, {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}, b"\0garbage"],
    ids=["list", "empty", "number", "nested", "unnamed", "garbage"],
)
def test_what_is_no_table_of_tensors(run: Run, tmp_path: Path, value: object) -> None:
    source = tmp_path / "old"
    source.mkdir()
    if isinstance(value, bytes):
        (source / "adapter_model.bin").write_bytes(value)
    else:
        torch.save(value, source / "adapter_model.bin")
    done = run(*COMMAND, str(source), str(tmp_path / "new"))
    assert done.code == 1
    assert "adapter_model.bin" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "new").exists()


def test_nothing_to_convert(run: Run, tmp_path: Path, shapes: ModelShapes) -> None:
    source = write_lora(tmp_path / "old", shapes)
    torch.save({"a": torch.ones(1)}, source / "adapter_model.bin")  # beside its safetensors
    done = run(*COMMAND, str(source), str(tmp_path / "new"))
    assert done.code == 1
    assert "safetensors" in done.err
    assert not (tmp_path / "new").exists()
    assert "can be uploaded as it is" in done.err
    assert run(*COMMAND, str(tmp_path / "missing"), str(tmp_path / "new")).code == 1
    for path in source.iterdir():
        if path.suffix != ".json":
            path.unlink()
    done = run(*COMMAND, str(source), str(tmp_path / "new"))
    assert done.code == 1
    assert ".pth" in done.err and "name the folder that holds them" in done.err


def test_a_full_target_is_kept(run: Run, tmp_path: Path, shapes: ModelShapes) -> None:
    source = pickled(write_lora(tmp_path / "old", shapes), "adapter_model.bin")
    target = tmp_path / "new"
    target.mkdir()
    (target / "mine").write_text("mine")
    done = run(*COMMAND, str(source), str(target))
    assert done.code == 1
    assert "empty" in done.err
    assert [path.name for path in target.iterdir()] == ["mine"]
