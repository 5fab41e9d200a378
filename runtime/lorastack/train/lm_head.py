"""The lm_head that heads are served with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorastack.adapters.formats.parse import parse
from lorastack.layout import LM_HEAD, NO_LAYER, Part
from lorastack.model.backends.base import Backend
from lorastack.tensorheader import TensorEntry

_ROWS = 4096  # that are fetched at a time


def served_lm_head(
    backend: Backend, loras: Sequence[tuple[Mapping[str, Path], float]]
) -> tuple[Tensor, bool]:
    """([V, H] on the host in the backend's dtype, whether a LoRA changes it).

    loras: each one's files by name, and its scale. Where a LoRA adapts lm_head, heads choose
    through the adapted one, from all tokens.
    """
    size, hidden = backend.shapes.vocab_size, backend.shapes.hidden_size
    lm_head_VH = torch.empty(size, hidden, dtype=backend.dtype)
    for start in range(0, size, _ROWS):
        ids = range(start, min(start + _ROWS, size))
        backend.head_rows(ids, lm_head_VH[start : ids.stop])
    changes = []
    for files, scale in loras:
        parsed = parse(files, backend.shapes)
        if (own_scale := parsed.scales.get((NO_LAYER, LM_HEAD))) is not None:
            a_RH, b_VR = (
                _read(parsed.tensors[NO_LAYER, LM_HEAD, part]) for part in (Part.A, Part.B)
            )
            changes.append((scale * own_scale) * (b_VR @ a_RH))
    if changes:
        lm_head_VH = lm_head_VH.float()
        for change_VH in changes:
            lm_head_VH += change_VH
        lm_head_VH = lm_head_VH.to(backend.dtype)
    return lm_head_VH, bool(changes)


def _read(entry: TensorEntry) -> Tensor:
    with safe_open(entry.path, "pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor.float()
