"""Adapter folders: which files they hold, what they are, whether they fit the base model.

`parse` reads configs, safetensors headers and draft vocabularies only and needs no torch;
`check_values` scans every value. Nothing is skipped silently: a tensor without a place, a field
without a meaning is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorastack.adapters.formats import medusa, peft
from lorastack.adapters.formats.alias import parse_alias
from lorastack.adapters.formats.base_names import Same, same_model
from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.formats.jsonfile import read_object, read_text
from lorastack.adapters.formats.refusal import invalid
from lorastack.adapters.formats.tensorfile import check_finite, read_header
from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason
from lorastack.folders import ALIAS_NAME
from lorastack.layout import AdapterKind, ModelShapes, TensorKey
from lorastack.tensorheader import TensorEntry

MAX_CONFIG = 4 << 20  # bytes of one file of JSON or text
MAX_TEMPLATE = 64 << 10  # characters; well-known models' templates have 20,000 at most
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_CODE = (".py", ".pyc", ".so")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAdapter:
    """A folder that fits the base model, its values still on disk."""

    facts: Facts
    base_models: tuple[str, ...]  # names in the configs: none, one, or two that differ
    draft_vocabulary: tuple[int, ...]  # of the heads; () for all tokens
    scales: Mapping[tuple[int, str], float]
    chat_template: str | None
    tensors: Mapping[TensorKey, TensorEntry]
    base_copies: Mapping[str, TensorEntry]  # base tensor name -> the folder's copy of it


def parse(
    files: Mapping[str, Path], shapes: ModelShapes, scales: Sequence[float] | None = None
) -> ParsedAdapter:
    """Parses a folder, given as file name -> path of its bytes.

    scales: the result of an earlier call for the same files, in the order of (layer, target); with
    them, no pattern is matched and no template read. Raises InvalidArgumentError naming the file,
    field, or tensor with both shapes.
    """
    _check_names(files)
    if ALIAS_NAME in files:
        return _alias(files)
    lora_config = _config(files, peft.CONFIG_NAME)
    heads_config = _config(files, medusa.CONFIG_NAME)
    if heads_config is not None and medusa.HEADS_FIELD not in heads_config:
        heads_config = None  # the base model's config, which some tools save beside a LoRA
    if lora_config is None and heads_config is None:
        raise invalid(
            f"the folder is no adapter: it has neither {peft.CONFIG_NAME} (LoRA) nor a "
            f"{medusa.CONFIG_NAME} with {medusa.HEADS_FIELD} (Medusa heads)"
        )
    entries = _tensors(files)
    lora_entries = {name: entries[name] for name in entries if peft.is_peft_tensor(name)}
    heads_entries = {name: entries[name] for name in entries if medusa.is_heads_tensor(name)}
    _check_unmatched(
        set(entries)
        - (set() if lora_config is None else set(lora_entries))
        - (set() if heads_config is None else set(heads_entries)),
        heads_config is None,
    )
    vocabulary = files.get(medusa.VOCABULARY_NAME)
    if vocabulary is not None and heads_config is None:
        raise invalid(
            f"{medusa.VOCABULARY_NAME} belongs to Medusa heads, but there is no "
            f"{medusa.CONFIG_NAME} with {medusa.HEADS_FIELD}: leave it out"
        )
    lora = (
        peft.parse_peft(lora_config, lora_entries, shapes, scales)
        if lora_config is not None
        else None
    )
    heads = (
        medusa.parse_medusa(heads_config, heads_entries, vocabulary, shapes)
        if heads_config is not None
        else None
    )
    return _combine(lora, heads, chat_template(files) if scales is None else None)


def _alias(files: Mapping[str, Path]) -> ParsedAdapter:
    facts = Facts(
        kind=AdapterKind.ALIAS,
        base_model="",
        rank=0,
        alpha=0.0,
        target_modules=(),
        num_heads=0,
        num_layers=0,
        medusa_version=0,
        alias=parse_alias(files),
    )
    return ParsedAdapter(
        facts=facts,
        base_models=(),
        draft_vocabulary=(),
        scales={},
        chat_template=None,
        tensors={},
        base_copies={},
    )


def _combine(
    lora: peft.LoraPart | None, heads: medusa.HeadsPart | None, template: str | None
) -> ParsedAdapter:
    kind = AdapterKind.LORA_WITH_MEDUSA
    if lora is None or heads is None:
        kind = AdapterKind.LORA if heads is None else AdapterKind.MEDUSA
    names = [part.base_model for part in (lora, heads) if part is not None and part.base_model]
    facts = Facts(
        kind=kind,
        base_model=names[0] if names else "",
        rank=lora.rank if lora else 0,
        alpha=lora.alpha if lora else 0.0,
        target_modules=lora.target_modules if lora else (),
        num_heads=heads.num_heads if heads else 0,
        num_layers=heads.num_layers if heads else 0,
        medusa_version=heads.version if heads else 0,
        shared_heads=heads.shared_heads if heads else None,
        private_rank=heads.private_rank if heads else 0,
        acceptance=heads.acceptance if heads else "",
    )
    return ParsedAdapter(
        facts=facts,
        base_models=tuple(dict.fromkeys(names)),
        draft_vocabulary=heads.draft_vocabulary if heads else (),
        scales=lora.scales if lora else {},
        chat_template=template,
        tensors={**(lora.tensors if lora else {}), **(heads.tensors if heads else {})},
        base_copies=lora.base_copies if lora else {},
    )


def check_base(
    parsed: ParsedAdapter, base_names: Collection[str], *, accept: bool = False
) -> tuple[str, ...]:
    """Compares the folder's name for its base model with the server's; returns warnings.

    base_names: what the server's model is called (hub id, folder, aliases). A folder that names no
    base passes, as its shapes were checked; accept: any name passes. Raises FailedPreconditionError
    for another model's name, and InvalidArgumentError for one that cannot be printed.
    """
    warnings = []
    for name in parsed.base_models:
        if not name.isprintable():
            raise invalid(f"base_model_name_or_path holds what cannot be printed: {name[:64]!r}")
        same = same_model(name, base_names)
        if same is Same.NO and not accept:
            raise FailedPreconditionError(
                f"the adapter was made for {name}, but this server runs "
                f"{' or '.join(base_names)}: if that is the same model, upload with --accept-base, "
                f"or start the server with --base-name {name}",
                reason=Reason.BASE_MODEL_DIFFERS,
                base_model=name,
            )
        if same is Same.PERHAPS and not accept:
            warnings.append(
                f"its config calls the base model {name[:200]}, which does not say whether it is "
                "the server's: only shapes were checked"
            )
    return tuple(warnings)


def check_chat_template(parsed: ParsedAdapter, files: Mapping[str, Path]) -> None:
    """Raises InvalidArgumentError naming the file of a template that is too long.

    `validate.Validator` compiles it, where that does no harm.
    """
    if len(parsed.chat_template or "") > MAX_TEMPLATE:
        file = TEMPLATE_NAME if TEMPLATE_NAME in files else TOKENIZER_CONFIG_NAME
        raise invalid(f"the chat template in {file} is longer than {MAX_TEMPLATE} characters")


def check_values(parsed: ParsedAdapter) -> None:
    """Raises InvalidArgumentError naming the first tensor that holds NaN or an infinity."""
    for entry in parsed.tensors.values():
        check_finite(entry)


def _check_names(files: Mapping[str, Path]) -> None:
    for name in files:
        lower = name.lower()
        if lower.endswith(_PICKLES):
            raise invalid(
                f"{name} is a pickle, which can run code when it is opened: convert its tensors "
                "to safetensors, or leave the file out if it is not needed for inference"
            )
        if lower.endswith(_CODE):
            raise invalid(f"{name} is code, which an adapter must not bring: leave it out")


def _config(files: Mapping[str, Path], name: str) -> dict[str, object] | None:
    return read_object(files[name], name, MAX_CONFIG) if name in files else None


def _tensors(files: Mapping[str, Path]) -> dict[str, TensorEntry]:
    """The tensors of all .safetensors files, by name, but for the draft vocabulary."""
    names = sorted(
        name for name in files if name.endswith(".safetensors") and name != medusa.VOCABULARY_NAME
    )
    if not names:
        raise invalid("the folder has no .safetensors file")
    entries: dict[str, TensorEntry] = {}
    for name in names:
        in_file = read_header(files[name], name)
        if twice := sorted(in_file.keys() & entries.keys()):
            raise invalid(f"tensor {twice[0]} is in {name} and in another file of the folder")
        entries |= in_file
    return entries


def _check_unmatched(names: set[str], no_heads_config: bool) -> None:
    if not names:
        return
    name = min(names)
    if medusa.is_heads_tensor(name) and no_heads_config:
        raise invalid(
            f"tensor {name} belongs to Medusa heads, but there is no {medusa.CONFIG_NAME} with "
            f"{medusa.HEADS_FIELD}"
        )
    if peft.is_peft_tensor(name):
        raise invalid(f"tensor {name} belongs to a LoRA, but there is no {peft.CONFIG_NAME}")
    raise invalid(
        f"tensor {name} is neither part of a PEFT LoRA nor of Medusa heads; whole models "
        "(full Medusa-2 checkpoints too) cannot be uploaded as adapters"
    )


def chat_template(files: Mapping[str, Path]) -> str | None:
    """The folder's own chat template: the jinja file, or else the tokenizer config's default.

    files: file name -> path. None without a template. Raises InvalidArgumentError for a malformed
    file.
    """
    if TEMPLATE_NAME in files:
        return read_text(files[TEMPLATE_NAME], TEMPLATE_NAME, MAX_CONFIG)
    config = _config(files, TOKENIZER_CONFIG_NAME) or {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = dict(map(_named_template, template))
        return named.get("default")
    if template is not None and not isinstance(template, str):
        raise _not_text()
    return template


def _named_template(item: object) -> tuple[str, str]:
    fields = item if isinstance(item, dict) else {}
    name, template = fields.get("name"), fields.get("template")
    if not isinstance(name, str) or not isinstance(template, str):
        raise _not_text()
    return name, template


def _not_text() -> InvalidArgumentError:
    return invalid(
        f"chat_template of {TOKENIZER_CONFIG_NAME} must be text, or a list of tables with a name "
        "and a template, which are text"
    )
