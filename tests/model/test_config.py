"""What a model folder may say, and the refusals by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.model.config import load_config
from tests.helpers.tiny import MAX_CONTEXT, shapes_of, write_json


def edited(folder: Path, target: Path, **fields: Any) -> Path:
    """config.json of `folder` with fields replaced (None: taken out), in `target`."""
    config = json.loads((folder / "config.json").read_text()) | fields
    write_json(target / "config.json", {k: v for k, v in config.items() if v is not None})
    return target


def test_shapes(tiny_llama: Path, tiny_mistral: Path):
    for folder in (tiny_llama, tiny_mistral):
        assert load_config(folder, None).shapes == shapes_of(folder)
    assert load_config(tiny_llama, None).window is None
    assert load_config(tiny_mistral, None).window == 24
    assert load_config(tiny_mistral, 100).shapes.max_context == 100


def test_a_plain_config_says_what_transformers_makes_of_it(tiny_llama: Path, tmp_path: Path):
    """Older spelling and left out defaults are for transformers to read."""
    plain = load_config(tiny_llama, 100)
    older = edited(tiny_llama, tmp_path, rope_parameters=None, rope_theta=1e4, mlp_bias=None)
    read = load_config(older, 100)
    assert replace(plain, inv_freq=read.inv_freq) == read
    assert torch.equal(plain.inv_freq, read.inv_freq)


def test_a_plain_model_does_without_the_imports_of_transformers(tiny_llama: Path):
    code = (
        "import sys; from pathlib import Path; import lorastack.service.server as _;"
        "from lorastack.model.config import load_config; load_config(Path(sys.argv[1]), None);"
        "print([name for name in sys.modules if name.startswith(('transformers', 'sympy'))])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "qwen2"}, "qwen2"),
        ({"hidden_act": "gelu"}, "gelu"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "gptq.*original.*--quantize",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": "fp8"}, "fp8"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}},
            "proportional",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_unsupported_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, fields: dict[str, Any], words: str
):
    with pytest.raises(InvalidArgumentError, match=words) as error:
        load_config(edited(tiny_llama, tmp_path, **fields), None)
    assert error.value.reason is Reason.UNSUPPORTED_MODEL


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_attention_heads": 7}, "7"),
    ],
)
def test_impossible_values_are_refused(
    tiny_llama: Path, tmp_path: Path, fields: dict[str, Any], words: str
):
    with pytest.raises(InvalidArgumentError, match=words) as error:
        load_config(edited(tiny_llama, tmp_path, **fields), None)
    assert error.value.reason is Reason.INVALID_MODEL


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_is_none(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"config\.json") as error:
        load_config(tmp_path, None)
    assert error.value.reason is Reason.INVALID_MODEL


@pytest.mark.parametrize("max_context", [0, -1, MAX_CONTEXT + 1])
def test_context_limit(tiny_llama: Path, max_context: int):
    with pytest.raises(InvalidArgumentError, match=f"max_context {max_context}"):
        load_config(tiny_llama, max_context)


def test_dynamic_rope_is_that_of_the_context_in_force(tiny_llama: Path, tmp_path: Path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = edited(tiny_llama, tmp_path, rope_parameters=rope, max_position_embeddings=64)
    plain = load_config(edited(tiny_llama, tmp_path, rope_parameters=rope), None).inv_freq
    edited(tiny_llama, tmp_path, rope_parameters=rope, max_position_embeddings=64)
    assert torch.equal(load_config(folder, None).inv_freq, plain)
    assert torch.equal(load_config(folder, 40).inv_freq, plain)
    longer = load_config(folder, 128)
    assert longer.shapes.max_context == 128 and (longer.inv_freq < plain)[1:].all()


@pytest.mark.parametrize(
    ("name", "method"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")]
)
def test_weights_that_a_file_beside_the_config_calls_quantised_are_refused(
    tiny_llama: Path, tmp_path: Path, name: str, method: str
):
    folder = edited(tiny_llama, tmp_path)
    (folder / name).write_text("{}")
    with pytest.raises(InvalidArgumentError, match=f"{name}.*{method}.*--quantize") as error:
        load_config(folder, None)
    assert error.value.reason is Reason.UNSUPPORTED_MODEL
