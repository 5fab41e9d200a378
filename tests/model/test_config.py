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
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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
        "import sys; from pathlib import Path; import lorastack.service.build as _;"
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


LENGTHS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 256),
    "older spelling": ({"type": "linear", "factor": 2}, 128),
    "broken factor": ({"rope_type": "linear", "factor": 1.3}, 83),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 128),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "yarn, scaled already": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        64,
    ),
    "yarn, original left out": ({"rope_type": "yarn", "factor": 4.0}, 256),
    "yarn, factor null": (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
        64,
    ),
    "llama3": (
        {
            **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        64,
    ),
}


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("rope", "length"), LENGTHS.values(), ids=LENGTHS.keys())
def test_the_context_is_the_one_after_scaling(
    tiny_llama: Path, tmp_path: Path, rope: dict[str, Any], length: int, field: str
):
    fields: dict[str, Any] = {"rope_parameters": None, "max_position_embeddings": 64}
    fields |= {"rope_theta": 1e4, field: rope}
    folder = edited(tiny_llama, tmp_path, **fields)
    assert load_config(folder, None).shapes.max_context == length
    assert load_config(folder, length).shapes.max_context == length
    assert load_config(folder, 40).shapes.max_context == 40
    with pytest.raises(InvalidArgumentError, match=f"{length + 1} is not in 1..{length}"):
        load_config(folder, length + 1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": "su", "factor": 4.0},
        {"type": "proportional", "factor": 4.0},
    ],
    ids=lambda rope: str(rope.get("rope_type")),
)
def test_other_scalings_are_refused_by_name(tiny_llama: Path, tmp_path: Path, rope: dict[str, Any]):
    folder = edited(tiny_llama, tmp_path, rope_parameters={"rope_theta": 1e4} | rope)
    with pytest.raises(InvalidArgumentError, match=rope.get("rope_type", "proportional")):
        load_config(folder, None)


ODD: list[Any] = [None, [], [[1]], {}, {"a": [1]}, "x", "", "2", -1, 0, 1.5, 10**30, True]
ODD += [10**5000, float("nan"), float("inf"), "a" * 1000, [None], {"content": 1}]
READ = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "model_type"),
    *("architectures", "original_max_position_embeddings"),
}
UNREAD = {"use_cache", "initializer_range", "bos_token_id", "pad_token_id", "torch_dtype"}
UNREAD |= {"attention_dropout", "pretraining_tp", "transformers_version", "id2label", "dtype"}
ROPE = {
    **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    **{"rope_theta": 1e4, "attention_factor": 1.2, "beta_fast": 30, "beta_slow": 2},
    **{"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "partial_rotary_factor": 1.0},
}


@pytest.fixture(params=["tiny_llama", "tiny_mistral"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.mark.parametrize("field", sorted(READ | UNREAD))
def test_an_odd_value_means_what_it_means_to_transformers_or_is_refused_by_name(
    model: Path, tmp_path: Path, field: str
):
    for value in ODD:
        check_odd(model, tmp_path, {field: value}, field)


@pytest.mark.parametrize("entry", sorted(ROPE))
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_an_odd_value_of_rope(tiny_llama: Path, tmp_path: Path, field: str, entry: str):
    for value in ODD:
        check_odd(tiny_llama, tmp_path, {field: ROPE | {entry: value}}, entry)


def check_odd(model: Path, target: Path, fields: dict[str, Any], named: str) -> None:
    sys.set_int_max_str_digits(0)
    text = json.dumps(json.loads((model / "config.json").read_text()) | fields)
    sys.set_int_max_str_digits(4300)
    (target / "config.json").write_text(text)
    try:
        read = load_config(target, None)
    except InvalidArgumentError as error:
        assert "config.json" in error.message
        assert named in error.message or "cannot be read" in error.message
        assert "\n" not in error.message and len(error.message) < 600
        return
    if named in UNREAD:
        assert read.shapes == load_config(model, None).shapes
        return
    config = AutoConfig.from_pretrained(target)
    shapes, window = read.shapes, getattr(config, "sliding_window", None)
    assert config.model_type == model.name.removeprefix("tiny-")
    assert shapes.vocab_size == config.vocab_size
    assert shapes.hidden_size == config.hidden_size
    assert shapes.intermediate_size == config.intermediate_size
    assert (shapes.num_layers, shapes.num_heads) == (
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    assert (shapes.num_kv_heads, shapes.head_dim) == (config.num_key_value_heads, config.head_dim)
    assert shapes.tie_word_embeddings == config.tie_word_embeddings
    assert read.rms_eps == config.rms_norm_eps
    assert read.window == (window if config.model_type == "mistral" else None)
    rotary = LlamaRotaryEmbedding(config)
    if read.inv_freq.dim() == 1:
        torch.testing.assert_close(read.inv_freq, rotary.inv_freq, atol=0, rtol=1e-6)
    assert read.rope_scale == rotary.attention_scaling


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
