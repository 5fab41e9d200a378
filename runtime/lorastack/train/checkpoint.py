"""A training run on disk, so that an interrupted one goes on with the same bits.

One safetensors file, replaced as a whole: the tensors, and in its metadata JSON of what the run is
(`identity`) and how far it is (`state`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer

from lorastack.adapters.store.durable import disk_full_is_exhaustion, replace_file
from lorastack.errors import DataLossError, FailedPreconditionError

_METADATA = "lorastack.training"


def save_checkpoint(
    path: Path,
    identity: Mapping[str, Any],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Replaces the file: after a crash it holds the old run or the new one.

    identity, state: JSON; floats keep every bit. Raises ResourceExhaustedError STORE_FULL.
    """
    metadata = {_METADATA: json.dumps({"identity": identity, "state": state})}
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_is_exhaustion(
        f"no room for the checkpoint {path}: free some space, then run the same command again; it "
        "goes on from the last one"
    ):
        replace_file(path, save(on_host, metadata))


def load_checkpoint(
    path: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(state, tensors on the host); None if there is no file.

    Raises FailedPreconditionError for the checkpoint of another run, naming what differs, and
    DataLossError for a file that is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})[_METADATA])
            known, state = dict(found["identity"]), dict(found["state"])
            names: list[str] = file.keys()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataLossError(f"{path} is no checkpoint, or is damaged: delete it") from error
    wanted = json.loads(json.dumps(identity))
    differing = [name for name, value in wanted.items() if known.get(name) != value]
    if differing:
        raise FailedPreconditionError(
            f"{path} is the checkpoint of another run (another {', '.join(differing)}): repeat "
            "what that run was given, name another working folder, or delete the file"
        )
    return state, tensors


def learning_tensors(
    learnt: Mapping[str, Tensor], best: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """What a checkpoint keeps of weights that learn, the best ones so far, and Adam's state."""
    tensors = {}
    for name, tensor in learnt.items():
        tensors[f"weights.{name}"] = tensor
        tensors[f"best.{name}"] = best[name]
        for kind, value in optimizer.state.get(tensor, {}).items():
            tensors[f"adam.{kind}.{name}"] = value
    return tensors


@torch.no_grad()
def restore_learning(
    tensors: Mapping[str, Tensor], learnt: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Puts back what `learning_tensors` kept; the best weights."""
    best = {}
    for name, tensor in learnt.items():
        tensor.copy_(tensors[f"weights.{name}"])
        best[name] = tensors[f"best.{name}"].to(tensor.device)
        kept = {
            kind: tensors[f"adam.{kind}.{name}"].to("cpu" if kind == "step" else tensor.device)
            for kind in ("step", "exp_avg", "exp_avg_sq")
            if f"adam.{kind}.{name}" in tensors
        }
        if kept:
            optimizer.state[tensor] = kept
    return best


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of dtypes, shapes and values."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        hashed.update(f"{plain.dtype} {list(plain.shape)}".encode())
        hashed.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
