"""Folders that PEFT saved: same modules, scales and tensors, or refused by the field's name."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import VeloraConfig
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedModel as HFModel

from lorastack.adapters.formats.fields import CONFIGS, READ, TRAINING
from lorastack.adapters.formats.parse import parse
from lorastack.adapters.formats.targets import module_names
from lorastack.adapters.formats.validate import Validator
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
    "look ahead": {"target_modules": r"^(model)(?!.*(lm_head|embed|mlp)).*(q|k)_proj"},
    "as unsloth writes it": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
    },
    "letter case": {"target_modules": r"(?i)MODEL\..*\.[Q-V]_PROJ"},
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
    assert parsed.facts.rank == max(layer.r["default"] for layer in layers.values())
    assert parsed.facts.target_modules == tuple(sorted({target for _, target in layers}))


@pytest.mark.parametrize(("fields", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_peft_saves_and_we_cannot_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    save(build(), tmp_path, **({"target_modules": ["q_proj"]} | fields))
    with pytest.raises(InvalidArgumentError, match=named):
        parse(files_of(tmp_path), SHAPES)


# What LoraConfig has beside the fields that are read and those of training: each refused by name.
MATHS = {
    *("alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication"),
    *("lora_bias", "megatron_config", "modules_to_save", "monteclora_config", "use_bdlora"),
    *("target_parameters", "trainable_token_indices", "use_dora", "use_qalora"),
}
FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}
# Values of training fields that PEFT itself takes.
TRAINED: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 3.0},
    "fan_in_fan_out": True,
    "inference_mode": False,
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.3,
    "lora_ga_config": {"direction": "random"},
    "megatron_core": "megatron.other",
    "peft_version": "9.9.9",
    "qalora_group_size": 32,
    "revision": "a branch",
    "velora_config": {"num_groups": 4},
}


def test_every_field_of_peft_has_its_meaning() -> None:
    assert FIELDS.keys() == (READ | TRAINING | MATHS) & FIELDS.keys()
    assert CONFIGS < MATHS and not MATHS & (READ | TRAINING) and not READ & TRAINING


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_defaults_of_peft_pass(tmp_path: Path, name: str) -> None:
    save(build(), tmp_path, target_modules=["q_proj"])
    default = getattr(LoraConfig(), name)
    if name in READ - {"use_rslora", "init_lora_weights", "ensure_weight_tying"}:
        return
    edit_json(
        tmp_path / "adapter_config.json", **{name: None if name == "runtime_config" else default}
    )
    parse(files_of(tmp_path), SHAPES)


@pytest.mark.parametrize("name", sorted(MATHS))
def test_every_field_that_changes_the_maths_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(build(), tmp_path, target_modules=["q_proj"])
    for nothing in (None, False, 0, "", "none", []):
        edit_json(tmp_path / "adapter_config.json", **{name: nothing})
        parse(files_of(tmp_path), SHAPES)
    for value in (True, 1, "some other value", [1], {"a": 1}, *([{}] if name in CONFIGS else [])):
        edit_json(tmp_path / "adapter_config.json", **{name: value})
        with pytest.raises(InvalidArgumentError, match=name) as refusal:
            parse(files_of(tmp_path), SHAPES)
        assert refusal.value.reason is Reason.UNSUPPORTED_ADAPTER


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_fields_of_training_change_nothing(tmp_path: Path, name: str) -> None:
    """PEFT computes the same with and without them, so they are accepted at any value."""
    embedding = [] if name == "velora_config" else ["embed_tokens"]  # which PEFT has no VeLoRA for
    save(build(False), tmp_path, target_modules=["q_proj", "down_proj", *embedding])
    ids = torch.arange(12)[None]

    def logits() -> torch.Tensor:
        model = PeftModel.from_pretrained(build(False), tmp_path)
        return torch.as_tensor(model.train(False)(ids).logits)

    before, parsed = logits(), parse(files_of(tmp_path), SHAPES)
    edit_json(tmp_path / "adapter_config.json", **{name: TRAINED[name]})
    assert torch.equal(logits(), before)
    assert parse(files_of(tmp_path), SHAPES) == parsed
    edit_json(tmp_path / "adapter_config.json", **{name: ["any", {"value": -1}]})
    assert parse(files_of(tmp_path), SHAPES) == parsed


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", "none", "None", [], {}])
def test_unknown_fields_that_say_nothing_pass(tmp_path: Path, value: Any) -> None:
    save(build(), tmp_path, target_modules=["q_proj"])
    edit_json(tmp_path / "adapter_config.json", from_the_future=value)
    PeftModel.from_pretrained(build(), tmp_path)
    parse(files_of(tmp_path), SHAPES)


@pytest.mark.parametrize(
    "fields",
    [
        {"swift_type": "LORA", "lorap_emb_lr": 1e-6, "lorap_lr_ratio": 16.0, "lora_dtype": None},
        {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6},
        {"enable_lora": None, "merge_weights": False},  # of PEFT's first versions
        {"init_lora_weights": "Gaussian"},
        {"ensure_weight_tying": True},  # with nothing that is tied
    ],
    ids=str,
)
def test_folders_of_other_trainers(tmp_path: Path, fields: dict[str, Any]) -> None:
    save(build(), tmp_path, target_modules=["q_proj"])
    expected = parse(files_of(tmp_path), SHAPES)
    edit_json(tmp_path / "adapter_config.json", **fields)
    PeftModel.from_pretrained(build(), tmp_path)
    assert parse(files_of(tmp_path), SHAPES) == expected


def test_an_adapter_trained_with_velora(tmp_path: Path) -> None:
    """Its folder holds what the backward pass needed."""
    save(build(), tmp_path, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
    assert len(parse(files_of(tmp_path), SHAPES).tensors) == 4


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
