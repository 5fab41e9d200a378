"""Folders that are refused, each by what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.errors import InvalidArgumentError
from tests.adapters.folders import (
    HEADS_CONFIG,
    HEADS_FILE,
    LARGE,
    LORA_CONFIG,
    LORA_FILE,
    Q_A,
    Q_B,
    SHAPES,
    Edit,
    H,
    edit_json,
    edit_tensors,
    parse_folder,
    refused,
)
from tests.helpers.adapters import write_heads

# -- refused: files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "heads.pt", "A.PT", "x.pkl", "training.ckpt"]
)
def test_pickles_are_refused_with_a_remedy(lora: Path, name: str) -> None:
    (lora / name).write_bytes(b"")
    assert "convert" in str(refused(lora, f"{name} is a pickle"))


def test_code_is_refused(lora: Path) -> None:
    (lora / "modeling.py").write_text("")
    refused(lora, r"modeling\.py is code")


def test_folders_that_are_no_adapters(tmp_path: Path, lora: Path, heads: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no adapter")
    (lora / LORA_FILE).unlink()
    refused(lora, r"no \.safetensors")
    (heads / HEADS_CONFIG).write_text(json.dumps({"model_type": "llama"}))
    refused(heads, "medusa_num_heads")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', '{"r": Infinity}'])
def test_configs_that_are_not_json_objects(lora: Path, text: str) -> None:
    (lora / LORA_CONFIG).write_text(text)
    refused(lora, LORA_CONFIG)


def test_a_tensor_in_two_files(lora: Path) -> None:
    save_file({Q_A: torch.zeros(4, H)}, lora / "more.safetensors")
    refused(lora, "q_proj.lora_A.weight is in more.safetensors and in another")


# -- refused: LoRA --------------------------------------------------------------------------------

LORA_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "unknown": ({"brand_new_maths": 3}, "brand_new_maths = '3'"),
    "other method": ({"peft_type": "IA3"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type"),
    "rank 0": ({"r": 0}, "r = 0"),
    "rank true": ({"r": True}, "r = True"),
    "rank text": ({"r": "8"}, "r = 8"),
    "alpha": ({"lora_alpha": None}, "lora_alpha"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha absurd": ({"lora_alpha": 1e300}, "lora_alpha"),
    "alpha absurd in a pattern": ({"alpha_pattern": {"q_proj": -1e9}}, "q_proj"),
    "rank pattern": ({"rank_pattern": {"q_proj": 0}}, "q_proj = 0"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern"),
    "bad regex": ({"target_modules": "(q_proj"}, "target_modules has the bad pattern"),
    "bad pattern": ({"alpha_pattern": {"*": 1}}, "alpha_pattern has the bad pattern"),
    "targets": ({"target_modules": [3]}, "target_modules must be"),
    "no match": ({"target_modules": ["c_attn"]}, "match no module"),
    "partial name": ({"target_modules": ["proj"]}, "match no module"),
    "empty": ({"target_modules": []}, "match no module"),
    "layers of a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "layers_to_transform",
    ),
    "layers text": ({"layers_to_transform": "0"}, "layers_to_transform"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "rslora number": ({"use_rslora": 1}, "use_rslora"),  # which PEFT takes for true
    "arrow of defaults": ({"arrow_config": {}}, "arrow_config"),
    "init number": ({"init_lora_weights": 1}, "init_lora_weights"),
    "recursion": ({"target_modules": "(?R)*"}, "target_modules has the bad pattern"),
    "back reference": (
        {"target_modules": r"(.)\1*.*"},
        "target_modules has a pattern with groupref",
    ),
    "many patterns": (
        {"rank_pattern": {f"z{number:x}": 1 for number in range(1025)}},
        "rank_pattern has 1025 patterns; at most 1024",
    ),
    "many layers patterns": (
        {"layers_to_transform": [0], "layers_pattern": ["layers"] * 1025},
        "layers_pattern has 1025 patterns",
    ),
    "base name of a surrogate": ({"base_model_name_or_path": "\ud800"}, "half a surrogate pair"),
    "unprintable field": ({"\x1b[31m": 3}, r"^\\x1b\[31m = '3'"),
    "base name": ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    "too few targets": ({"target_modules": ["q_proj"]}, "does not target .*up_proj"),
    "too many targets": (
        {"target_modules": ["q_proj", "up_proj", "k_proj"]},
        "k_proj, but its lora_A is missing",
    ),
    "too few layers": ({"layers_to_transform": [1]}, r"does not target .*layers\.0"),
    "another rank": ({"r": 8}, r"shape \[4, 16\].* need \[8, 16\]"),
}


@pytest.mark.parametrize(("fields", "named"), LORA_FIELDS.values(), ids=LORA_FIELDS.keys())
def test_lora_configs_are_refused_by_name(lora: Path, fields: dict[str, Any], named: str) -> None:
    edit_json(lora / LORA_CONFIG, **fields)
    refused(lora, named)


def _rename(old: str, new: str) -> Edit:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return edit


LORA_TENSORS: dict[str, tuple[Edit, str]] = {
    "missing A": (lambda t: t.__delitem__(Q_A), "q_proj, but its lora_A is missing"),
    "missing B": (lambda t: t.__delitem__(Q_B), "q_proj, but its lora_B is missing"),
    "wrong in": (
        lambda t: t.update({Q_A: torch.zeros(4, H + 1)}),
        rf"q_proj.lora_A.weight has shape \[4, {H + 1}\].* need \[4, {H}\]",
    ),
    "wrong out": (
        lambda t: t.update({Q_B: torch.zeros(H + 2, 4)}),
        rf"q_proj.lora_B.weight has shape \[{H + 2}, 4\].* need \[{H}, 4\]",
    ),
    "flat": (lambda t: t.update({Q_A: torch.zeros(4 * H)}), r"has shape \[64\]"),
    "layer beyond": (_rename(Q_A, Q_A.replace("layers.0", "layers.2")), r"layers\.2.*2 layers"),
    "norm": (
        lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(1, H)}),
        "model.norm",
    ),
    "no prefix": (_rename(Q_A, Q_A.removeprefix("base_model.model.")), "whole models"),
    "adapter name": (_rename(Q_A, Q_A.replace("weight", "default.weight")), "default.weight"),
    "dora": (
        lambda t: t.update({Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(H)}),
        "lora_magnitude_vector",
    ),
    "bias": (
        lambda t: t.update({Q_A.replace("lora_A.weight", "lora_B.bias"): torch.zeros(H)}),
        "lora_B.bias",
    ),
    "whole weight": (
        lambda t: t.update({Q_A.replace("lora_A", "base_layer"): torch.zeros(H, H)}),
        "base_layer.weight is a whole weight",
    ),
    "resized": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(33, H)}),
        rf"lm_head.weight has shape \[33, {H}\].* need \[32, {H}\]",
    ),
    "embedding": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 32)}
        ),
        "wrong kind",
    ),
    "heads": (lambda t: t.update({"0.0.linear.bias": torch.zeros(H)}), "Medusa heads.*config.json"),
}


@pytest.mark.parametrize(("edit", "named"), LORA_TENSORS.values(), ids=LORA_TENSORS.keys())
def test_lora_tensors_are_refused_by_name(lora: Path, edit: Edit, named: str) -> None:
    edit_tensors(lora / LORA_FILE, edit)
    refused(lora, named)


def test_the_patterns_of_a_config_share_their_steps(lora: Path) -> None:
    """One pattern is fine, a thousand of them are not."""
    slow = "(?:[a-p.]|[b-z.]|[c-y_])*(?:[a-z]|[.]|\\d)*Z"
    edit_json(lora / LORA_CONFIG, rank_pattern={slow: 3})
    parse_folder(lora)
    edit_json(lora / LORA_CONFIG, rank_pattern={slow + "Z" * n: 3 for n in range(1000)})
    refused(lora, "rank_pattern: the patterns take more than")


def test_as_many_patterns_as_a_large_model_has_projections(lora: Path) -> None:
    """PEFT's EVA writes a rank and an alpha for each."""
    names = [f"model.layers.{n}.self_attn.a_projection" for n in range(1020)]
    edit_json(
        lora / LORA_CONFIG,
        rank_pattern=dict.fromkeys(names, 8) | {"q_proj": 4},
        alpha_pattern=dict.fromkeys(names, 3) | {"q_proj": 2},
    )
    assert parse_folder(lora).scales[0, "q_proj"] == 0.5


# -- refused: draft vocabularies ------------------------------------------------------------------

VOCABULARIES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "other name": ({"ids": torch.arange(64)}, "one tensor, draft_vocabulary"),
    "two tensors": (
        {"draft_vocabulary": torch.arange(64), "more": torch.arange(64)},
        "one tensor, draft_vocabulary",
    ),
    "no tensor": ({}, "one tensor, draft_vocabulary"),
    "floats": ({"draft_vocabulary": torch.arange(64.0)}, "dtype F32, not I32, I64"),
    "a table": ({"draft_vocabulary": torch.arange(128).view(2, 64)}, r"shape \[2, 64\]"),
    "too few": ({"draft_vocabulary": torch.arange(63)}, r"shape \[63\]: .* 64 to 16384"),
    "too many": ({"draft_vocabulary": torch.arange(16_385)}, r"\[16385\]: .* 64 to 16384"),
    "negative": ({"draft_vocabulary": torch.arange(64) - 1}, "from 0 to 19999"),
    "unknown": ({"draft_vocabulary": torch.arange(64) + 19_937}, "from 0 to 19999"),
    "not rising": ({"draft_vocabulary": torch.arange(64).flip(0)}, "rising"),
    "twice": ({"draft_vocabulary": torch.tensor([0, *range(64)])}, "each once"),
}


@pytest.mark.parametrize(("tensors", "named"), VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_draft_vocabularies_are_refused_by_name(
    heads: Path, tensors: dict[str, torch.Tensor], named: str
) -> None:
    save_file(tensors, heads / "draft_vocabulary.safetensors")
    with pytest.raises(InvalidArgumentError, match=named) as refusal:
        parse_folder(heads, LARGE)
    assert "draft_vocabulary" in str(refusal.value)


def test_draft_vocabularies_go_with_version_2_heads_only(tmp_path: Path, lora: Path) -> None:
    ids = range(SHAPES.vocab_size)
    heads = write_heads(tmp_path / "x", H, vocab_size=SHAPES.vocab_size, draft_vocabulary=ids)
    refused(heads, "goes with version 2 heads.* leave it out")
    shutil.copy(heads / "draft_vocabulary.safetensors", lora)
    refused(lora, "belongs to Medusa heads.* leave it out")
    (lora / LORA_FILE).unlink()
    refused(lora, r"no \.safetensors|belongs to Medusa heads")


# -- refused: heads -------------------------------------------------------------------------------

HEADS_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "too few": (
        {"medusa_num_heads": 2},
        "tensor 2.0.linear.* belongs to no head: .*medusa_num_heads = 2",
    ),
    "too many": ({"medusa_num_heads": 4}, "3.0.linear.bias is missing"),
    "none": ({"medusa_num_heads": 0}, "medusa_num_heads = 0"),
    "true": ({"medusa_num_heads": True}, "medusa_num_heads = True"),
    "text": ({"medusa_num_heads": "3"}, "medusa_num_heads = '3' .* a whole number"),
    "layers": ({"medusa_num_layers": 2}, "medusa_num_layers = 2, but 0.1.linear.bias is missing"),
    "many layers": ({"medusa_num_layers": 33}, "medusa_num_layers = 33"),
    "no layers": ({"medusa_num_layers": None}, "medusa_num_layers"),
    "version 1": ({"version": "1"}, "says version 1.* as version 2 does"),
    "no version": ({"version": None}, "no version, which means 1.* as version 2 does"),
    "version 3": ({"version": "3"}, "version = '3'"),
    "version true": ({"version": True}, "version = 'True'"),
}


@pytest.mark.parametrize(("fields", "named"), HEADS_FIELDS.values(), ids=HEADS_FIELDS.keys())
def test_heads_configs_are_refused_by_name(heads: Path, fields: dict[str, Any], named: str) -> None:
    edit_json(heads / HEADS_CONFIG, **fields)
    refused(heads, named)


def test_heads_of_another_hidden_size(tmp_path: Path) -> None:
    folder = write_heads(tmp_path / "x", 20, num_heads=1)
    refused(folder, rf"0.0.linear.* has shape \[20(, 20)?\].* needs \[{H}(, {H})?\]")


@pytest.mark.parametrize(("version", "outputs"), [("1", False), ("2", True)])
def test_versions_that_the_tensors_contradict(tmp_path: Path, version: str, outputs: bool) -> None:
    vocab_size = SHAPES.vocab_size if outputs else None
    folder = write_heads(tmp_path / "x", H, num_heads=2, vocab_size=vocab_size)
    edit_json(folder / HEADS_CONFIG, version=version)
    has = r"holds 0\.1\.weight" if outputs else "holds no output matrices"
    refused(folder, f"says version {version}, but the folder {has}")


HEADS_TENSORS: dict[str, tuple[Edit, str]] = {
    "no output": (lambda t: t.__delitem__("1.2.weight"), r"but 1\.2\.weight is missing"),
    "no block": (
        lambda t: t.__delitem__("0.1.linear.bias"),
        r"medusa_num_layers = 2, but 0\.1\.linear\.bias is missing",
    ),
    "a block too many": (
        lambda t: t.update({"0.2.linear.weight": torch.zeros(H, H)}),
        r"0\.2\.linear\.weight belongs to no head: .*medusa_num_layers = 2",
    ),
    "an output too early": (
        lambda t: t.update({"0.1.weight": torch.zeros(SHAPES.vocab_size, H)}),
        r"0\.1\.weight belongs to no head",
    ),
    "another vocabulary": (
        lambda t: t.update({"0.2.weight": torch.zeros(33, H)}),
        rf"0\.2\.weight has shape \[33, {H}\].* needs \[32, {H}\]",
    ),
    "another hidden size": (
        lambda t: t.update({"1.1.linear.weight": torch.zeros(H, H + 1)}),
        rf"1\.1\.linear\.weight has shape \[{H}, {H + 1}\].* needs \[{H}, {H}\]",
    ),
}


@pytest.mark.parametrize(("edit", "named"), HEADS_TENSORS.values(), ids=HEADS_TENSORS.keys())
def test_heads_tensors_are_refused_by_name(tmp_path: Path, edit: Edit, named: str) -> None:
    folder = write_heads(tmp_path / "x", H, num_heads=2, num_blocks=2, vocab_size=SHAPES.vocab_size)
    edit_tensors(folder / HEADS_FILE, edit)
    refused(folder, named)


def test_a_whole_model_is_no_adapter(heads: Path) -> None:
    rename = {f"medusa_head.{name}": t for name, t in load_file(heads / HEADS_FILE).items()}
    save_file(rename | {"model.norm.weight": torch.zeros(H)}, heads / HEADS_FILE)
    refused(heads, "full Medusa-2 checkpoints")


def test_a_bundle_without_its_lora_config(lora: Path, heads: Path) -> None:
    shutil.copy(lora / LORA_FILE, heads)
    refused(heads, f"belongs to a LoRA, but there is no {LORA_CONFIG}")
