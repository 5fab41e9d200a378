"""Where a base model's files are: a folder, the hub, or the default's cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from lorastack.errors import InvalidArgumentError
from lorastack.model.checkpoint import INDEX, SINGLE
from lorastack.model.config import HEADS_FIELD
from lorastack.model.fetch.default import DEFAULT_MODEL_NAME, default_model
from lorastack.model.fetch.download import Progress
from lorastack.modelfiles import invalid, read_object
from lorastack.printable import error_line, one_line

log = logging.getLogger(__name__)

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
HUB_COPIES = ["consolidated*.safetensors"]  # the same weights under other names
ADAPTER_CONFIG = "adapter_config.json"


def model_folder(model: str | None, progress: Progress | None = None) -> tuple[Path, str]:
    """The folder of a model's files and the name that adapters know it by.

    Raises InvalidArgumentError for what is neither a folder nor on the hub, and for adapters.
    """
    if model is None:
        return default_model(progress), DEFAULT_MODEL_NAME
    place = os.path.expanduser(model)
    if os.path.isdir(place):
        folder = Path(place)
        name = folder.resolve().name
    else:
        folder, name = _from_hub(model, is_file=os.path.isfile(place)), model
    _refuse_adapter(folder, model)
    return folder, name


def _from_hub(model: str, *, is_file: bool) -> Path:
    named = one_line(model[:100])
    if is_file:
        raise invalid(f"--model {named} is a file: name the folder that holds it")
    missing = f"--model {named}: there is no folder {named}"
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    except HFValidationError:
        cause = "and it is not a hub id, ORG/NAME"
    except GatedRepoError:
        cause = "and the hub gives the model only to those whom its owner lets in: ask for access "
        cause += "on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        cause = "and the hub has no model of that name that may be read: check the name; for a "
        cause += "private one log in with `hf auth login`"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        cause = "and the hub cannot be reached, nor was the model fetched from it before: check "
        cause += "the network and HF_HUB_OFFLINE, or name a folder"
    except (OSError, ValueError) as error:
        cause = f"and the hub's copy cannot be had: {error_line(error)}"
    raise invalid(f"{missing}, {cause}")


def _refuse_adapter(folder: Path, model: str) -> None:
    config = read_object(folder / "config.json")
    has_model = "model_type" in config and any((folder / n).exists() for n in (SINGLE, INDEX))
    if (folder / ADAPTER_CONFIG).exists():
        if has_model:
            log.warning("%s in %s is ignored: the model beside it is served", ADAPTER_CONFIG, model)
            return
        raise _adapter(model, "an adapter", read_object(folder / ADAPTER_CONFIG))
    if HEADS_FIELD in config and "model_type" not in config:
        raise _adapter(model, "Medusa heads", config)


def _adapter(model: str, kind: str, config: dict[str, object]) -> InvalidArgumentError:
    base = config.get("base_model_name_or_path")
    message = f"--model {model} is the folder of {kind}, not of a base model: "
    if isinstance(base, str) and base:
        message += f"its base is {one_line(base[:100])}; serve that with --model, and "
    else:
        message += "its files do not name its base; serve the one it was made for, and "
    return invalid(message + f"upload this with `lorastack adapters upload {model} --id ID`")
