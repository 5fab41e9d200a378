"""Folders that are accepted, and what their names and values must be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorastack.adapters.formats.parse import chat_template, check_base, check_values
from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason
from lorastack.layout import HEADS, AdapterKind, Part, head_block
from tests.adapters.folders import (
    HEADS_CONFIG,
    HEADS_FILE,
    LARGE,
    LORA_CONFIG,
    LORA_FILE,
    SHAPES,
    H,
    edit_json,
    edit_tensors,
    files_of,
    parse_folder,
    refused,
)
from tests.helpers.adapters import write_draft_vocabulary, write_heads

# -- what is accepted -----------------------------------------------------------------------------


def test_a_lora(lora: Path) -> None:
    parsed = parse_folder(lora)
    assert parsed.facts.kind is AdapterKind.LORA
    assert (parsed.facts.rank, parsed.facts.alpha, parsed.facts.num_heads) == (4, 16.0, 0)
    assert parsed.facts.target_modules == ("q_proj", "up_proj")
    assert parsed.scales == dict.fromkeys(
        [(i, t) for i in (0, 1) for t in ("q_proj", "up_proj")], 4.0
    )


def test_heads(heads: Path) -> None:
    parsed = parse_folder(heads)
    assert parsed.facts.kind is AdapterKind.MEDUSA
    assert (parsed.facts.num_heads, parsed.facts.num_layers, parsed.facts.medusa_version) == (
        3,
        1,
        2,
    )
    assert parsed.tensors.keys() == {
        (head, HEADS, part) for head in range(3) for part in (Part.WEIGHT, Part.BIAS)
    }
    assert parsed.tensors[2, HEADS, Part.WEIGHT].name == "2.0.linear.weight"


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_heads_of_both_versions(tmp_path: Path, version: int, num_blocks: int) -> None:
    vocab_size = SHAPES.vocab_size if version == 1 else None
    folder = write_heads(tmp_path / "x", H, num_blocks=num_blocks, vocab_size=vocab_size)
    parsed = parse_folder(folder)
    assert (parsed.facts.num_heads, parsed.facts.num_layers, parsed.facts.medusa_version) == (
        3,
        num_blocks,
        version,
    )
    names = {entry.name for entry in parsed.tensors.values()}
    assert names == load_file(folder / HEADS_FILE).keys()
    for head in range(3):
        for block in range(num_blocks):
            key = (head_block(head, block, 3), HEADS, Part.WEIGHT)
            assert parsed.tensors[key].name == f"{head}.{block}.linear.weight"
        if version == 1:
            assert parsed.tensors[head, HEADS, Part.OUTPUT].name == f"{head}.{num_blocks}.weight"


def test_published_version_one_heads(tmp_path: Path) -> None:
    """The layout of FasterDecoding/medusa-vicuna-*-v1.3: five heads, no version, float16."""
    folder = write_heads(
        tmp_path / "medusa-vicuna",
        H,
        num_heads=5,
        vocab_size=SHAPES.vocab_size,
        dtype=torch.float16,
        base_model_name_or_path="lmsys/vicuna-7b-v1.3",
        transformers_version="4.31.0",
    )
    assert "version" not in json.loads((folder / HEADS_CONFIG).read_text())
    parsed = parse_folder(folder)
    assert (parsed.facts.num_heads, parsed.facts.medusa_version, len(parsed.tensors)) == (5, 1, 15)
    check_base(parsed, ["vicuna-7b-v1.3"])


@pytest.mark.parametrize("one_file", [True, False])
def test_a_bundle_in_one_or_several_files(lora: Path, heads: Path, one_file: bool) -> None:
    shutil.copy(heads / HEADS_CONFIG, lora)
    if one_file:
        edit_tensors(
            lora / LORA_FILE, lambda tensors: tensors.update(load_file(heads / HEADS_FILE))
        )
    else:
        shutil.copy(heads / HEADS_FILE, lora)
    parsed = parse_folder(lora)
    assert parsed.facts.kind is AdapterKind.LORA_WITH_MEDUSA
    assert (parsed.facts.rank, parsed.facts.num_heads, len(parsed.tensors)) == (4, 3, 4 * 2 + 6)


@pytest.mark.parametrize("version", ["2", 2, 2.0, "2.0"])
def test_versions_that_mean_two(heads: Path, version: object) -> None:
    edit_json(heads / HEADS_CONFIG, version=version)
    assert parse_folder(heads).facts.medusa_version == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", [range(64), [*range(2, 130, 2), 19_999], range(16_384)])
def test_draft_vocabularies(heads: Path, ids: Sequence[int], dtype: torch.dtype) -> None:
    assert parse_folder(heads, LARGE).draft_vocabulary == ()
    write_draft_vocabulary(heads, torch.tensor(ids, dtype=dtype))
    parsed = parse_folder(heads, LARGE)
    assert parsed.draft_vocabulary == tuple(ids)
    assert len(parsed.tensors) == 6


def test_harmless_files_are_kept(lora: Path) -> None:
    for name in ("README.md", "tokenizer.json", "special_tokens_map.json", "merges.txt"):
        (lora / name).write_text("{}")
    (lora / "config.json").write_text(json.dumps({"model_type": "llama"}))  # the base model's
    assert parse_folder(lora).facts.kind is AdapterKind.LORA


def test_chat_templates(lora: Path) -> None:
    files = files_of(lora)
    assert chat_template(files) is None
    config = lora / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert parse_folder(lora).chat_template == "plain"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert parse_folder(lora).chat_template == "d"
    (lora / "chat_template.jinja").write_text("a file of its own")
    assert parse_folder(lora).chat_template == "a file of its own"
    (lora / "chat_template.jinja").write_bytes(b"\xff")
    refused(lora, r"chat_template\.jinja is not UTF-8")


# -- base model and values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "served", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("/data/models/smollm2-135m-instruct/", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("mirror/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", True),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", False),
        (None, "anything", True),
        ("", "anything", True),
    ],
)
def test_base_names(lora: Path, heads: Path, named: str | None, served: str, same: bool) -> None:
    edit_json(heads / HEADS_CONFIG, base_model_name_or_path=named)
    edit_json(lora / LORA_CONFIG, base_model_name_or_path=named)
    for folder in (heads, lora):
        parsed = parse_folder(folder)
        assert parsed.facts.base_model == (named or "")
        if same:
            assert check_base(parsed, ["other", served]) == ()
            continue
        with pytest.raises(FailedPreconditionError, match=str(named)) as refusal:
            check_base(parsed, ["other", served])
        assert refusal.value.reason is Reason.BASE_MODEL_DIFFERS
        for remedy in ("--accept-base", f"--base-name {named}"):
            assert remedy in refusal.value.message
        check_base(parsed, ["other", served, str(named)])
        check_base(parsed, ["other", served], accept=True)


def test_a_path_that_says_nothing_is_worth_a_warning(lora: Path, heads: Path) -> None:
    for folder, config in ((lora, LORA_CONFIG), (heads, HEADS_CONFIG)):
        edit_json(folder / config, base_model_name_or_path="/data/runs/checkpoint-500")
        parsed = parse_folder(folder)
        (warning,) = check_base(parsed, ["org/base"])
        assert "/data/runs/checkpoint-500" in warning
        assert check_base(parsed, ["org/base"], accept=True) == ()


def test_both_parts_of_a_bundle_name_the_base(lora: Path, heads: Path) -> None:
    edit_json(lora / LORA_CONFIG, base_model_name_or_path="org/base")
    edit_json(heads / HEADS_CONFIG, base_model_name_or_path="org/another")
    for path in files_of(heads).values():
        shutil.copy(path, lora)
    with pytest.raises(FailedPreconditionError, match="org/another"):
        check_base(parse_folder(lora), ["org/base"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_are_scanned(lora: Path, heads: Path, value: float) -> None:
    check_values(parse_folder(lora))
    check_values(parse_folder(heads))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[max(tensors)].view(-1)[-1] = value

    edit_tensors(lora / LORA_FILE, spoil)
    edit_tensors(heads / HEADS_FILE, spoil)
    with pytest.raises(InvalidArgumentError, match=r"q_proj\.lora_B\.weight contains NaN"):
        check_values(parse_folder(lora))
    with pytest.raises(InvalidArgumentError, match=r"2\.0\.linear\.weight contains NaN"):
        check_values(parse_folder(heads))
