"""A LoRA's own files, to lie beside its heads in one folder."""

from __future__ import annotations

from lorastack.adapters.formats.medusa import CONFIG_NAME, VOCABULARY_NAME, is_heads_tensor
from lorastack.adapters.formats.tensorfile import read_header
from lorastack.errors import InvalidArgumentError
from lorastack.folders import HEADS_WEIGHTS
from lorastack.request import LoraUse
from lorastack.train.folder import CARD_NAME, EVALUATION_NAME, PLOT_NAME
from lorastack.train.local import LocalEngine

_HEADS_FILES = {CONFIG_NAME, VOCABULARY_NAME, CARD_NAME, EVALUATION_NAME, PLOT_NAME}


def check_bundle(loras: tuple[LoraUse, ...]) -> None:
    """Raises InvalidArgumentError unless a bundle can stand for these LoRAs."""
    if len(loras) != 1 or loras[0].scale != 1.0:
        raise InvalidArgumentError(
            "--bundle is for exactly one LoRA at scale 1, as a bundle is served: leave it out and "
            "store the heads alone, or with an alias for the selection"
        )


def lora_files(engine: LocalEngine, lora: LoraUse) -> dict[str, bytes]:
    """The LoRA's files by name, without heads that it brings already.

    Raises InvalidArgumentError if these share a file with the LoRA, or the new ones would.
    """
    files = {}
    for name, path in engine.files(lora.digest).items():
        if name in _HEADS_FILES:
            continue
        if name.endswith(".safetensors"):
            are_heads = [is_heads_tensor(tensor) for tensor in read_header(path, name)]
            if are_heads and all(are_heads):
                continue
            if any(are_heads) or name == HEADS_WEIGHTS:
                raise InvalidArgumentError(
                    f"{lora.lora_id!r} has its LoRA in {name}, where its heads are or would be: a "
                    "new bundle needs them apart; train without --bundle"
                )
        files[name] = path.read_bytes()
    return files
