"""What `lorastack adapters convert` does. It imports torch, so only that command imports it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorastack.client.downloading import new_folder
from lorastack.client.uploading import folder_files
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.folders import belongs, is_pickled_weights


def convert_folder(source: Path, target: Path) -> tuple[dict[str, str], list[str]]:
    """Writes an adapter's folder anew without pickles, all of it or nothing.

    Pickles are opened with weights_only, which runs no code. Returns old name -> new name of what
    was converted, and the names of the files that were left out. Raises InvalidArgumentError for a
    file that holds more than tensors or a folder without any to convert; FailedPreconditionError
    for a target that is not empty.
    """
    paths = folder_files(source)
    kept = [path for path in paths if belongs(path.name)]
    names = {path.name for path in kept}
    weights = {
        path: f"{path.stem}.safetensors"
        for path in paths
        if is_pickled_weights(path.name) and f"{path.stem}.safetensors" not in names
    }
    if not weights:
        whole = any(name.endswith(".safetensors") for name in names)
        remedy = "it can be uploaded as it is" if whole else "name the folder that holds them"
        raise _refused(
            f"{source} holds no .pt, .pth or .bin weights that lack a .safetensors file: {remedy}"
        )
    if len(set(weights.values())) < len(weights):
        files = ", ".join(path.name for path in weights)
        raise _refused(f"two of {files} would become the same file: take one out")
    with new_folder(target) as folder:
        for path, name in weights.items():
            save_file(_tensors(path), folder / name, metadata={"format": "pt"})
        for path in kept:
            shutil.copyfile(path, folder / path.name)
    left_out = [path.name for path in paths if path not in weights and path not in kept]
    return {path.name: name for path, name in weights.items()}, left_out


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # torch's own text recommends weights_only=False, which would run whatever is in there.
        raise _refused(
            f"{path.name} is damaged, or holds more than tensors: save its state_dict() with "
            "torch.save and convert that"
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise _refused(f"{path.name} holds no table of tensors, but {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise _refused(f"{path.name}: {str(name)[:80]} is {kind}, not a tensor by name")
    # Copies: safetensors takes no tensors that share memory, as repeated blocks do.
    return {name: value.detach().contiguous().clone() for name, value in tensors.items()}


def _refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=Reason.INVALID_ADAPTER)
