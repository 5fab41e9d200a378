"""Merged LoRAs equal PEFT's own `add_weighted_adapter`, number by number."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.utils import get_peft_model_state_dict, merge_utils
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from lorastack.adapters.formats import merged as merged_module
from lorastack.adapters.formats.merged import Merge, MergeSource, target_seed
from lorastack.adapters.formats.merging import MajoritySign, MergeRule, Strategy, merge_tensors
from lorastack.adapters.formats.parse import parse
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from tests.adapters.folders import files_of
from tests.helpers.adapters import lora_config, write_lora, write_lora_tensors

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning")

KEY = "k"
RULES = [
    MergeRule(strategy=strategy, density=density, majority_sign=sign)
    for strategy in Strategy
    for density in (0.01, 0.3, 0.7, 1.0)
    for sign in MajoritySign
]
WEIGHTS = (0.7, -1.5, 1.0)


def name_of(rule: MergeRule) -> str:
    return f"{rule.strategy}-{rule.density}-{rule.majority_sign}"


def peft_merged(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], rule: MergeRule
) -> torch.Tensor:
    """merge_utils' function of the strategy; torch's own generator draws."""
    arguments: list[Any] = [list(tensors), torch.tensor(weights), rule.density]
    if rule.strategy is not Strategy.DARE_LINEAR:
        arguments.append(rule.majority_sign.value)
    result: torch.Tensor = getattr(merge_utils, rule.strategy.value)(*arguments)
    return result


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_tensor_is_what_peft_makes_of_it(rule: MergeRule, count: int) -> None:
    random = torch.Generator().manual_seed(count)
    # More values than one piece; small whole numbers, so that magnitudes and votes tie, too.
    tensors = [torch.randint(-3, 4, (37, 1024), generator=random).float() for _ in range(count)]
    weights = torch.randn(count, generator=random).tolist()
    torch.manual_seed(5)
    expected = peft_merged(tensors, weights, rule)
    given = [tensor.clone() for tensor in tensors]
    ours = merge_tensors(given, weights, rule, torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert bool(ours.any()) == bool(expected.any())


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    everything = (*LAYER_TARGETS, EMBED, LM_HEAD)
    return {
        "plain": write_lora(root / "plain", tiny_llama_shapes, seed=1, rank=4, targets=everything),
        "rslora": write_lora(
            root / "rslora", tiny_llama_shapes, seed=2, rank=4, alpha=3, use_rslora=True
        ),
        "few": write_lora(
            root / "few",
            tiny_llama_shapes,
            seed=3,
            rank=4,
            targets=("q_proj", "up_proj"),
            dtype=torch.bfloat16,
        ),
    }


@pytest.fixture(scope="module")
def peft_model(tiny_llama: Path, folders: dict[str, Path]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, folder in folders.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return model


@pytest.fixture
def seeded_peft(peft_model: Any) -> Iterator[Any]:
    """PEFT's model; before each module it seeds torch as we seed ours."""
    inner = LoraModel._generalized_task_arithmetic_weighted_adapter
    names = {id(module): name for name, module in peft_model.base_model.model.named_modules()}

    def merge(self: Any, kind: str, adapters: Any, weights: Any, target: Any, *rest: Any) -> Any:
        torch.manual_seed(target_seed(KEY, names[id(target)]))
        return inner(self, kind, adapters, weights, target, *rest)

    with patch.object(LoraModel, "_generalized_task_arithmetic_weighted_adapter", merge):
        yield peft_model
    peft_model.delete_adapter("merged")


def sources(folders: dict[str, Path], shapes: ModelShapes) -> list[MergeSource]:
    return [
        MergeSource(name=name, parsed=parse(files_of(folder), shapes), weight=weight)
        for (name, folder), weight in zip(folders.items(), WEIGHTS, strict=True)
    ]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.density == 0.7], ids=name_of)
def test_an_adapter_is_what_peft_makes_of_it(
    rule: MergeRule,
    seeded_peft: Any,
    folders: dict[str, Path],
    tiny_llama_shapes: ModelShapes,
    tmp_path: Path,
) -> None:
    merge = Merge(sources(folders, tiny_llama_shapes), rule, KEY, tiny_llama_shapes)
    file = io.BytesIO()
    merge.write(file, lambda: None)
    assert len(file.getvalue()) == merge.num_bytes
    ours = load(file.getvalue())
    seeded_peft.add_weighted_adapter(
        list(folders),
        list(WEIGHTS),
        "merged",
        combination_type=rule.strategy.value,
        density=rule.density,
        majority_sign_method=rule.majority_sign.value,
    )
    expected = get_peft_model_state_dict(
        seeded_peft, adapter_name="merged", save_embedding_layers=False
    )
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)
    (tmp_path / "adapter_config.json").write_bytes(merge.config)
    (tmp_path / "adapter_model.safetensors").write_bytes(file.getvalue())
    parsed = parse(files_of(tmp_path), tiny_llama_shapes)
    assert set(parsed.scales.values()) == {1.0}
    assert parsed.facts.rank == 4


def test_ranks_of_single_modules_stay(tmp_path: Path, tiny_llama_shapes: ModelShapes) -> None:
    """Where all have the same; PEFT itself writes a config that does not say so."""
    loras = []
    for seed in (1, 2):
        folder, targets = tmp_path / str(seed), ("q_proj", "up_proj")
        write_lora(folder / "q", tiny_llama_shapes, seed=seed, rank=2, targets=targets[:1])
        write_lora(folder / "up", tiny_llama_shapes, seed=seed, rank=4, targets=targets[1:])
        parts = [load_file(folder / name / "adapter_model.safetensors") for name in ("q", "up")]
        config = lora_config(4, 4, targets, rank_pattern={"q_proj": 2})
        write_lora_tensors(folder, parts[0] | parts[1], config)
        parsed = parse(files_of(folder), tiny_llama_shapes)
        loras.append(MergeSource(name=str(seed), parsed=parsed, weight=1.0))
    rule = MergeRule(strategy=Strategy.TIES, density=0.5)
    merge = Merge(loras, rule, KEY, tiny_llama_shapes)
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        merge.write(file, lambda: None)
    (tmp_path / "adapter_config.json").write_bytes(merge.config)
    merged = parse(files_of(tmp_path), tiny_llama_shapes)
    assert set(merged.scales.values()) == {1.0}
    assert {key[1]: entry.shape[0] for key, entry in merged.tensors.items() if key[2] == "A"} == {
        "q_proj": 2,
        "up_proj": 4,
    }


def test_other_ranks_and_too_much_memory_are_refused_by_name(
    tmp_path: Path,
    folders: dict[str, Path],
    tiny_llama_shapes: ModelShapes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = MergeRule(strategy=Strategy.TIES, density=0.5)
    loras = sources(folders, tiny_llama_shapes)
    wide = parse(files_of(write_lora(tmp_path / "w", tiny_llama_shapes, rank=5)), tiny_llama_shapes)
    other = [*loras, MergeSource(name="wide", parsed=wide, weight=1.0)]
    with pytest.raises(InvalidArgumentError, match="'plain' has rank 4 and 'wide' has rank 5") as e:
        Merge(other, rule, KEY, tiny_llama_shapes)
    assert e.value.reason is Reason.UNSUPPORTED_ADAPTER
    monkeypatch.setattr(merged_module, "MAX_MEMORY", 1000)
    with pytest.raises(InvalidArgumentError, match="lower rank"):
        Merge(loras, rule, KEY, tiny_llama_shapes)
