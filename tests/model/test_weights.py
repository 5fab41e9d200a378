"""In which memory weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import load_config
from lorastack.model.weights import Packing, load_weights


@pytest.mark.parametrize("copies", [True, False])
def test_only_backends_that_copy_get_one_memory_for_all(tiny_mistral: Path, copies: bool) -> None:
    seen: list[Tensor] = []

    def pack(weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        seen.append(weight_OI)
        return weight_OI.clone()

    weights = load_weights(
        Checkpoint(tiny_mistral),
        load_config(tiny_mistral, None),
        device=torch.device("cpu"),
        dtype=torch.float32,
        packing=Packing(pack, pair=pack, head=pack, copies=copies),
    )
    memories = {tensor.data_ptr() for tensor in seen}
    if (
        copies
    ):  # it grows with the largest matrix so far: q, k and v, then gate and up, then lm_head
        assert len(memories) <= 3 < len(seen)
    else:
        assert len(memories) == len(seen)
    layer = weights.layers[0]
    for name, rows in (("gate_proj", slice(0, 96)), ("up_proj", slice(96, 192))):
        stored = torch.empty(96, 64)
        Checkpoint(tiny_mistral).read_into(f"model.layers.0.mlp.{name}.weight", stored)
        assert torch.equal(layer.gate_up[rows], stored)
