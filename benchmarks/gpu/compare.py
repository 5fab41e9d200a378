"""What stages compare with: float64, one token at a time, and memory full of NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.setting import Setting
from lorastack.kernels.triton.attention import AttentionWorkspace, attend
from lorastack.kernels.triton.attention_plan import AttentionArrays, AttentionShape, plan_attention
from lorastack.kernels.triton.lora import CHUNK, add_embedding, expand, shrink
from lorastack.kernels.triton.lora_plan import (
    PAIR_FIELDS,
    TILE_FIELDS,
    AdapterTable,
    LoraArrays,
    LoraUse,
    embedding_site,
    plan_lora,
    workspace_size,
)
from lorastack.kernels.triton.matmul import matmul
from lorastack.kernels.triton.pointwise import Projection, add_parts
from lorastack.kernels.triton.weight import Weight
from lorastack.layout import GROUPS, ModelShapes
from lorastack.lora.weights import LoraWeights
from lorastack.model.context import RowSpan
from lorastack.request import MAX_LORAS


def error_of(found: Tensor, expected: Tensor) -> float:
    """Of all numbers together, relative; infinite where one is not finite."""
    difference = found.double() - expected.double()
    error = float(difference.norm() / expected.double().norm())
    return error if np.isfinite(error) else float("inf")


def check_untouched(rest: Tensor) -> None:
    """Raises AssertionError if anything was written there, where NaN was."""
    assert rest.isnan().all(), f"{int((~rest.isnan()).sum())} numbers written beyond the last token"


def check_equal(found: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless all bits are equal."""
    assert torch.equal(found, expected), f"{int((found != expected).sum())} numbers differ"


def products(setting: Setting, x_TI: Tensor, weight: Weight, bucket: int) -> Tensor:
    """x W^T in float32, by the kernel and the sum of its parts, in a bucket of so many tokens."""
    count = len(x_TI)
    padded_TI = setting.poisoned(bucket, weight.num_inputs, dtype=x_TI.dtype)
    padded_TI[:count] = x_TI
    shape = (weight.plan.num_parts(bucket), bucket, weight.num_outputs)
    parts_CTO, num_tokens = setting.poisoned(*shape), setting.ints(count)
    matmul(padded_TI, weight, parts_CTO, num_tokens)
    check_untouched(parts_CTO[:, count:])
    if len(parts_CTO) > 1:
        add_parts(Projection(parts_CTO), parts_CTO[0], num_tokens)
    return parts_CTO[0, :count]


def upload(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(each).to(device) for name, each in arrays.items()}


class AttentionStep:
    """A step's rows over one layer's pages, in memory of its own."""

    def __init__(self, setting: Setting, rows: Sequence[RowSpan], shape: AttentionShape) -> None:
        self._setting, self._shape = setting, shape
        self._count, max_parts = rows[-1].end, 512
        room = sum(len(row.block_table) + row.num_tokens**2 for row in rows)
        lengths = AttentionArrays.lengths(self._count, max_parts, room)
        host = {name: np.zeros(size, dtype=np.int32) for name, size in lengths.items()}
        plan_attention(rows, shape, max_parts, AttentionArrays(**host))
        self._arrays = AttentionArrays(**upload(host, setting.device))
        programs = 8
        if setting.on_device:
            properties = torch.cuda.get_device_properties(setting.device)
            programs = 3 * properties.multi_processor_count
        self._workspace = AttentionWorkspace.of(shape, max_parts, programs, setting.device)
        self._workspace.sums.fill_(torch.nan)

    def run(self, q_TX: Tensor, kv: Tensor) -> Tensor:
        """Of queries [tokens, heads * D]; into memory of NaN."""
        out_TX = self._setting.poisoned(*q_TX.shape, dtype=q_TX.dtype)
        self.write(q_TX, kv, out_TX)
        return out_TX

    def write(self, q_TX: Tensor, kv: Tensor, out_TX: Tensor) -> None:
        """Two launches."""
        attend(q_TX, kv, self._arrays, self._workspace, out_TX, self._shape, self._count)


class LoraStep:
    """A step's LoRAs. uses: (start, end, adapter, scale) over the step's tokens."""

    def __init__(
        self,
        setting: Setting,
        shapes: ModelShapes,
        uses: Sequence[tuple[int, int, LoraWeights, float]],
        count: int,
    ) -> None:
        self._setting, self._shapes = setting, shapes
        tables: dict[int, AdapterTable] = {}
        for *_, weights, _scale in uses:
            if id(weights) not in tables:
                tables[id(weights)] = self._table(weights)
        laid = [
            LoraUse(start, end, tables[id(weights)], scale) for start, end, weights, scale in uses
        ]
        host: dict[str, Any] = {
            "counts": np.zeros(2, np.int32),
            "adapted_T": np.zeros(count, np.int32),
            "tiles": np.zeros((count, TILE_FIELDS), np.int32),
            "pairs": np.zeros((count * MAX_LORAS, PAIR_FIELDS), np.int64),
        }
        plan_lora(laid, count, LoraArrays(**host))
        self.arrays = LoraArrays(**upload(host, setting.device))
        self._tables = tables  # which hold what the arrays point to
        widest = max(shapes.hidden_size, shapes.intermediate_size)
        self.shrunk_CS = setting.poisoned(-(-widest // CHUNK), workspace_size(laid))

    def _table(self, weights: LoraWeights) -> AdapterTable:
        embedding = None if weights.embedding is None else weights.embedding.group
        device, layers = self._setting.device, self._shapes.num_layers
        return AdapterTable.of(weights.groups, embedding, layers, device)

    def outputs(self, group: int) -> list[int]:
        """Of each target."""
        return [self._shapes.target_shape(target)[0] for target in GROUPS[group]]

    def deltas(self, x_TI: Tensor, group: int, layer: int = 0) -> Tensor:
        """What a group's LoRAs add, NaN at tokens without."""
        delta_TO = self._setting.poisoned(len(x_TI), sum(self.outputs(group)))
        self.add(x_TI, group, delta_TO, layer)
        return delta_TO

    def add_embedding(self, ids_T: Tensor, hidden_TH: Tensor, dtype: torch.dtype) -> None:
        """In place. dtype: of the adapters."""
        shapes = self._shapes
        site = embedding_site(shapes.num_layers)
        bucket = len(ids_T)
        add_embedding(ids_T, self.arrays, site, shapes.vocab_size, dtype, hidden_TH, bucket)

    def add(self, x_TI: Tensor, group: int, delta_TO: Tensor, layer: int = 0) -> None:
        """Two launches."""
        site, (bucket, inputs) = layer * len(GROUPS) + group, x_TI.shape
        shrink(x_TI, self.arrays, site, self.shrunk_CS, bucket)
        expand(
            *(self.shrunk_CS, self.arrays, site, self.outputs(group), inputs, x_TI.dtype),
            *(delta_TO, bucket),
        )
