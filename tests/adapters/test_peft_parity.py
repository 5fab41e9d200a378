"""Folders that PEFT saved: same modules, scales and tensors, or refused by the field's name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedModel as HFModel

from lorastack.adapters.formats import parse
from lorastack.adapters.load import Validator
from lorastack.adapters.targets import module_names
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import EMBED, LM_HEAD, NO_LAYER, ModelShapes, Part
from tests.adapters.folders import SHAPES, edit_json, files_of
from tests.helpers.packed import read_tensors

SIZES: dict[str, Any] = {
    "hidden_size": SHAPES.hidden_size,
    "intermediate_size": SHAPES.intermediate_size,
    "num_hidden_layers": SHAPES.num_layers,
    "num_attention_heads": SHAPES.num_heads,
    "num_key_value_heads": SHAPES.num_kv_heads,
    "vocab_size": SHAPES.vocab_size,
    "max_position_embeddings": SHAPES.max_context,
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SUPPORTED: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "default targets": {},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"]},
    "regex": {"target_modules": r".*\.layers\.1\..*(q|v|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"], "r": 2, "lora_alpha": 3},
    "everything": {"target_modules": [*ALL_LINEAR, "embed_tokens", "lm_head"]},
    "rslora": {"target_modules": ALL_LINEAR, "use_rslora": True, "r": 6, "lora_alpha": 5},
    "patterns": {
        "target_modules": ALL_LINEAR,
        "rank_pattern": {
            "q_proj": 2,
            r"layers\.1\.mlp\..*_proj": 5,
            "model.layers.0.mlp.up_proj": 1,
        },
        "alpha_pattern": {r".*\.0\..*": 3, "v_proj": 7, "^model.layers.1.self_attn.o_proj": 11},
    },
    "pattern order": {
        "target_modules": ["q_proj"],
        "alpha_pattern": {"q_proj": 5, "layers.1.self_attn.q_proj": 3},
    },
    "no partial match": {"target_modules": ["q_proj"], "rank_pattern": {"proj": 3, "_proj": 2}},
    "rslora and patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"k_proj": 9},
        "alpha_pattern": {"gate_proj": 0.5},
    },
    "one layer": {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 7]},
    "no layers": {"target_modules": ["v_proj"], "layers_to_transform": []},
    "layers pattern": {
        "target_modules": ["v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "full name beside layers": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj", "lm_head"],
        "layers_to_transform": [1],
    },
    "exclude list": {"target_modules": ALL_LINEAR, "exclude_modules": ["q_proj", "1.mlp.up_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "unused targets": {"target_modules": ["q_proj", "c_attn"]},
}

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias of lora": ({"bias": "lora_only"}, "bias"),
    "all biases": ({"bias": "all"}, "bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "pissa niter": ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "trainable tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        "target_parameters",
    ),
    "weight tying": (
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        "ensure_weight_tying",
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(tied: bool = True) -> HFModel:
    torch.manual_seed(0)
    if tied:
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, tie_word_embeddings=False))


def save(model: HFModel, folder: Path, *, copies: bool | str = "auto", **fields: Any) -> PeftModel:
    """A PEFT model with random weights, saved."""
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(folder, save_embedding_layers=copies)
    (folder / "README.md").unlink(missing_ok=True)
    return peft_model


def wrapped(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Module name -> LoRA layer of everything that PEFT adapts."""
    modules = peft_model.base_model.model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("tied", [True, False], ids=["llama", "mistral"])
@pytest.mark.parametrize("fields", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_same_modules_scales_and_tensors(
    tmp_path: Path, fields: dict[str, Any], tied: bool
) -> None:
    save(build(tied), tmp_path, **fields)
    # As PEFT loads it, not as it was in memory: saving sorts the patterns, whose order matters.
    peft_model = PeftModel.from_pretrained(build(tied), tmp_path)
    parsed = parse(files_of(tmp_path), SHAPES)
    modules = module_names(SHAPES)
    layers = {modules[name]: layer for name, layer in wrapped(peft_model).items()}
    assert layers
    assert parsed.scales == pytest.approx(
        {place: layer.scaling["default"] for place, layer in layers.items()}, rel=1e-12
    )
    tensors = read_tensors(parsed)
    assert tensors.keys() == {(*place, part) for place in layers for part in (Part.A, Part.B)}
    for (index, target), layer in layers.items():
        if target == EMBED:
            pair = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(tensors[index, target, Part.A], pair[0])
        assert torch.equal(tensors[index, target, Part.B], pair[1])
    assert parsed.rank == max(layer.r["default"] for layer in layers.values())
    assert parsed.target_modules == tuple(sorted({target for _, target in layers}))


@pytest.mark.parametrize(("fields", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_peft_saves_and_we_cannot_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    save(build(), tmp_path, **({"target_modules": ["q_proj"]} | fields))
    with pytest.raises(InvalidArgumentError, match=named):
        parse(files_of(tmp_path), SHAPES)


HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "init_lora_weights", "eva_config", "megatron_core"),
    "qalora_group_size",
}


@pytest.mark.parametrize("name", sorted(LoraConfig().to_dict().keys() - HARMLESS))
def test_every_other_field_of_peft_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(build(), tmp_path, target_modules=["q_proj"])
    parse(files_of(tmp_path), SHAPES)
    edit_json(tmp_path / "adapter_config.json", **{name: "some other value"})
    with pytest.raises(InvalidArgumentError, match=name) as refusal:
        parse(files_of(tmp_path), SHAPES)
    assert refusal.value.reason is Reason.UNSUPPORTED_ADAPTER


def validator(model: HFModel, shapes: ModelShapes = SHAPES) -> Validator:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Validator(shapes=shapes, base_names=("tiny",), base_weight=weights.__getitem__)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "targets", [["embed_tokens", "lm_head"], ["lm_head", "q_proj"], ["q_proj"]]
)
def test_copies_of_base_weights_are_compared(
    tmp_path: Path, targets: list[str], tied: bool
) -> None:
    model = build(tied)
    check = validator(model)
    peft_model = save(model, tmp_path, target_modules=targets, copies=True)
    parsed = check(files_of(tmp_path))
    assert parsed.base_copies
    assert not {NO_LAYER} & {layer for layer, target, _ in parsed.tensors if target not in targets}
    assert set(parsed.base_copies) <= {f"model.{EMBED}.weight", f"{LM_HEAD}.weight"}

    with torch.no_grad():
        for name, tensor in peft_model.named_parameters():
            if (EMBED in name or LM_HEAD in name) and "lora" not in name:
                tensor[3, 5] += 1e-3
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(InvalidArgumentError, match=r"embed_tokens.*differs|lm_head.*differs"):
        check(files_of(tmp_path))


def test_a_copy_in_a_narrower_dtype_is_still_a_copy(tmp_path: Path) -> None:
    model = build()
    check = validator(model)
    peft_model = save(model, tmp_path, target_modules=["lm_head"])
    peft_model.to(torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    assert check(files_of(tmp_path)).base_copies
