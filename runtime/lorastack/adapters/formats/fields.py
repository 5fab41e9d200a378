"""What the fields of an adapter_config.json mean for the saved adapter.

Source: LoraConfig of peft 0.21; tests compare the installed one with this list, field by field.
A field is read (`peft`), or matters to training alone. Any other changes the maths, or might: it
must be off, which is null, false, 0, empty or "none".
"""

from __future__ import annotations

from collections.abc import Mapping

from lorastack.adapters.formats.refusal import invalid, unsupported

READ = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
        *("ensure_weight_tying", "peft_type", "task_type", "base_model_name_or_path"),
    }
)
# Any value leaves the saved adapter's output as it is.
TRAINING = frozenset(
    {
        *("auto_mapping", "inference_mode", "lora_dropout", "peft_version", "revision"),
        # Details of an initialisation; init_lora_weights says which one it was.
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config"),
        "velora_config",  # another backward pass
        "fan_in_fan_out",  # for Conv1D; PEFT sets it to false for the linear layers of our models
        *("megatron_core", "qalora_group_size"),  # details of megatron_config, use_qalora
        # Not PEFT's: LoRA+ and ms-swift.
        *("loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"),
        *("lorap_lr_ratio", "lorap_emb_lr", "lora_dtype", "swift_type"),
        *("transformers_version", "unsloth_version"),
    }
)
# {} switches these on, with defaults; in all other fields that change the maths it means off.
CONFIGS = frozenset({"arrow_config", "kasa_config", "monteclora_config", "use_bdlora"})
# Initialisations that leave the base weights as they are.
_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})


def check_fields(config: Mapping[str, object], file: str) -> None:
    """Raises InvalidArgumentError naming the first field that asks for what is not supported.

    config: a LoRA's, from `file`. Of the fields in READ, only peft_type, task_type and
    init_lora_weights are checked here.
    """
    if config.get("peft_type") != "LORA":
        shown = str(config.get("peft_type"))[:64]
        raise unsupported(f"peft_type is {shown!r}; only LORA is supported")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        shown = str(config["task_type"])[:64]
        raise unsupported(f"task_type is {shown!r}; only CAUSAL_LM is supported")
    _check_init(config.get("init_lora_weights"))
    for name, value in config.items():
        if name in READ or name in TRAINING:
            continue
        if not _says_nothing(value) or (name in CONFIGS and value == {}):
            raise unsupported(f"{name[:64]} = {str(value)[:64]!r} in {file} is not supported")


def _check_init(value: object) -> None:
    """Refuses PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ: their adapters need changed base weights."""
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise invalid("init_lora_weights must be true, false or the name of an initialisation")
    if value.lower() not in _HARMLESS_INITS:
        raise unsupported(
            f"init_lora_weights is {value[:64]!r}, which changes the base model's weights: "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _says_nothing(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "none")
    return value is None or value in ([], {}) or (isinstance(value, int | float) and value == 0)
