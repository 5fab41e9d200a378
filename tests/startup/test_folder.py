"""What --model may name, and what is said of all else."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import ModelShapes
from lorastack.startup import folder as folder_module
from lorastack.startup.folder import model_folder
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.tiny import write_json

BASE = "acme/base-7b"


def refusal(model: object) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        model_folder(str(model))
    assert caught.value.reason is Reason.INVALID_MODEL
    assert "\n" not in caught.value.message and len(caught.value.message) < 600
    return caught.value.message


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_models_folder(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder(str(tiny_llama)) == (tiny_llama, "tiny-llama")
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    assert model_folder("~/tiny-llama") == (tiny_llama, "tiny-llama")


def test_a_loras_folder_says_so_and_names_its_base(
    tmp_path: Path, tiny_llama_shapes: ModelShapes
) -> None:
    lora = write_lora(tmp_path / "lora", tiny_llama_shapes, seed=1)
    edit(lora / "adapter_config.json", base_model_name_or_path=BASE)
    message = refusal(lora)
    assert "an adapter" in message and BASE in message and "adapters upload" in message
    for odd in (None, "", 5, ["x"], "a\nb", "x" * 5000):
        edit(lora / "adapter_config.json", base_model_name_or_path=odd)
        assert "an adapter" in refusal(lora)
    (lora / "adapter_config.json").write_text("[")
    assert "adapter_config.json" in refusal(lora)


def test_the_folder_of_heads_says_so(tmp_path: Path) -> None:
    heads = write_heads(tmp_path / "heads", 64, num_heads=1, seed=1)
    edit(heads / "config.json", base_model_name_or_path=BASE)
    message = refusal(heads)
    assert "Medusa heads" in message and BASE in message


def test_a_model_beside_an_adapter_is_served_and_the_log_says_so(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Path(shutil.copytree(tiny_llama, tmp_path / "both"))
    write_json(both / "adapter_config.json", {"peft_type": "LORA"})
    with caplog.at_level(logging.WARNING):
        assert model_folder(str(both))[0] == both
    assert "adapter_config.json" in caplog.text
    (both / "model.safetensors").unlink()
    assert "an adapter" in refusal(both)


@pytest.mark.parametrize(
    "model",
    [
        "/no/such/folder",
        "./model",
        "../model",
        "a/b/c",
        "~nobody-here/x",
        "x y",
        "a" * 5000,
        "a\nb",
    ],
)
def test_a_path_that_is_not_there(model: str) -> None:
    message = refusal(model)
    assert "there is no folder" in message and "not a hub id, ORG/NAME" in message


def test_a_file_is_not_a_folder(tiny_llama: Path) -> None:
    assert "is a file" in refusal(tiny_llama / "model.safetensors")


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal("acme/no-such-model")
    assert "there is no folder acme/no-such-model, and the hub cannot be reached" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_errors.LocalEntryNotFoundError("x\ny"), "cannot be reached"),
        (OSError(28, os.strerror(28)), "No space left"),
        (ValueError("odd\nanswer"), "odd answer"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_the_hub_does_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(folder_module, "snapshot_download", fail)
    assert words in refusal("acme/model")
