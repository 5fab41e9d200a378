"""A step's numbers, laid out on the host and brought to the device in one copy.

A bucket is the number of tokens that a step's launches are made for: the least that holds the step.
Its arrays have fixed places, so that launches, once captured, serve every step of the bucket; how
much of them counts is itself among the numbers (`sizes`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorastack.kernels.triton.accept import Slots, Trees
from lorastack.kernels.triton.attention_plan import (
    ITEM_PAGES,
    AttentionArrays,
    AttentionShape,
    plan_attention,
)
from lorastack.kernels.triton.lora_plan import (
    PAIR_FIELDS,
    TILE_FIELDS,
    Ints,
    Longs,
    LoraArrays,
    LoraUse,
    plan_lora,
    workspace_size,
)
from lorastack.kernels.triton.samples import SETTINGS, Nodes, settings_of
from lorastack.model.backends.triton.device import Device
from lorastack.model.backends.triton.heads import (
    HeadsPlan,
    fill_heads,
    heads_fields,
    heads_pairs,
)
from lorastack.model.backends.triton.packed import Fields, Packed, int_fields
from lorastack.model.context import ForwardBatch, SampledTree
from lorastack.request import MAX_LORAS

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)

TOKENS, OUTPUTS, TREES = range(3)  # places in `sizes`

TREE_HEADS, LEAST_PAIRS, MAX_PAIRS = 8, 16, 512  # of trees and heads
LEAST_ROOM = 1 << 14  # floats a chunk of the LoRAs' workspace


def bucket_of(num_tokens: int) -> int:
    """The bucket that a step of so many tokens runs in.

    Those above the last of BUCKETS take memory of their own each, so they are few: twice the last,
    four times, and so on.
    """
    bucket = BUCKETS[min(bisect_left(BUCKETS, num_tokens), len(BUCKETS) - 1)]
    while bucket < num_tokens:
        bucket *= 2
    return bucket


@dataclass(frozen=True, slots=True)
class Limits:
    """What sizes a step's arrays beside its bucket. row_pages: of the longest row."""

    attention: AttentionShape
    max_parts: int
    row_pages: int


@dataclass(frozen=True, slots=True)
class Loras:
    """What a step with LoRAs is launched for. room: floats a chunk of the workspace.

    lm_head, embedding: some LoRA adapts them.
    """

    room: int
    lm_head: bool
    embedding: bool

    @classmethod
    def of(cls, uses: Sequence[LoraUse]) -> Loras | None:
        """None without a LoRA. Rooms come in a few sizes, so that steps share graphs."""
        if not uses:
            return None
        room, needed = LEAST_ROOM, workspace_size(uses)
        while room < needed:
            room *= 4
        return cls(
            room,
            any(use.table.adapts_lm_head for use in uses),
            any(use.table.adapts_embedding for use in uses),
        )


class StepInputs:
    """The arrays of a bucket, filled anew for every step.

    On the device: token_ids_T, last_T (the last position of the prompt of each token's row, for
    dynamic RoPE) and outputs_X (places in the step), int32; what the kernels of
    attention, LoRAs (over tokens, and over outputs for lm_head), sampling and acceptance read; and
    the counts of tokens, outputs and trees, int32 [1].
    """

    def __init__(self, bucket: int, limits: Limits, device: torch.device, calls: Device) -> None:
        self._limits = limits
        self._packed = Packed(_fields(bucket, limits), device, calls)
        on_device = self._packed.device
        self.bucket = bucket
        self.num_tokens = on_device["sizes"][TOKENS:][:1]
        self.num_outputs = on_device["sizes"][OUTPUTS:][:1]
        self.token_ids_T: Tensor = on_device["token_ids_T"]
        self.last_T: Tensor = on_device["last_T"]
        self.outputs_X: Tensor = on_device["outputs_X"]
        names = AttentionArrays.lengths(bucket, limits.max_parts, 0)
        self.attention = AttentionArrays(**{name: on_device[name] for name in names})
        self._host_attention = AttentionArrays(**{name: self._packed.host[name] for name in names})
        self.lora, self._host_lora = lora_arrays(self._packed, "")
        self.output_lora, self._host_output_lora = lora_arrays(self._packed, "output_")
        self.nodes = Nodes(
            on_device["tree_X"], on_device["depth_X"], on_device["settings_BS"], self.num_outputs
        )
        self.trees = Trees(
            first_B=on_device["first_B"],
            size_B=on_device["size_B"],
            token_X=on_device["token_X"],
            parent_X=on_device["parent_X"],
            num_trees=on_device["sizes"][TREES:][:1],
        )
        self.heads = heads_pairs(self._packed)
        self.slots = Slots(*(on_device[name] for name in ("lists", "table_B", "committed_B")))
        self._lists = 0

    def fill(
        self, batch: ForwardBatch, uses: Sequence[LoraUse], heads: HeadsPlan | None
    ) -> Loras | None:
        """Lays a step out on the host. No copy may read it any more. uses: its LoRAs' tables."""
        host, num_tokens = self._packed.host, len(batch.token_ids)
        num_outputs = len(batch.outputs)
        host["sizes"][:] = (num_tokens, num_outputs, len(batch.trees))
        host["token_ids_T"][:num_tokens] = batch.token_ids
        host["last_T"][:num_tokens] = np.repeat(
            [row.prompt - 1 for row in batch.rows], [row.num_tokens for row in batch.rows]
        )
        host["outputs_X"][:num_outputs] = batch.outputs
        limits = self._limits
        self._lists = plan_attention(
            batch.rows, limits.attention, limits.max_parts, self._host_attention
        )
        self._fill_trees(batch.trees, num_outputs)
        if heads is not None:
            fill_heads(self._packed, heads.layout)
        loras = Loras.of(uses)
        if loras is not None:
            plan_lora(uses, num_tokens, self._host_lora)
            if loras.lm_head:
                plan_lora(_selected(uses, batch.outputs), num_outputs, self._host_output_lora)
        return loras

    def upload(self) -> None:
        """Enqueues the copy of what was filled."""
        self._packed.upload(self._lists)

    def _fill_trees(self, trees: Sequence[SampledTree], num_outputs: int) -> None:
        host = self._packed.host
        host["tree_X"][:num_outputs] = -1
        if not trees:
            return
        places = host["outputs_X"][:num_outputs]
        position_X = host["position_T"][places]
        for index, each in enumerate(trees):
            tree, first = each.tree, each.first_output
            nodes = slice(first, first + tree.num_nodes)
            host["tree_X"][nodes] = index
            host["depth_X"][nodes] = position_X[nodes] - position_X[first]
            host["token_X"][nodes] = tree.tokens
            host["parent_X"][nodes] = tree.parents
            host["settings_BS"][index] = settings_of(each.params, each.token_index)
        count = len(trees)
        first_B = np.array([each.first_output for each in trees])
        item_B = host["item_T"][places[first_B]]
        host["first_B"][:count] = first_B
        host["size_B"][:count] = [each.tree.num_nodes for each in trees]
        host["table_B"][:count] = host["items"][item_B, ITEM_PAGES]
        host["committed_B"][:count] = position_X[first_B]


def _fields(bucket: int, limits: Limits) -> Fields:
    """Arrays by name; `lists`, which is filled in part, comes last."""
    # Pages of as many rows, and the ancestors in a tree that is one path.
    max_lists = bucket * limits.row_pages + bucket * (bucket + 1) // 2
    by_token = ("token_ids_T", "last_T", "outputs_X", "tree_X", "depth_X", "token_X", "parent_X")
    by_tree = ("first_B", "size_B", "table_B", "committed_B")
    return {
        "settings_BS": (torch.int64, (bucket, SETTINGS)),
        **lora_fields(bucket, ""),
        **lora_fields(bucket, "output_"),
        **heads_fields(most_pairs(bucket)),
        **int_fields({"sizes": (3,), **dict.fromkeys((*by_token, *by_tree), (bucket,))}),
        **int_fields(AttentionArrays.lengths(bucket, limits.max_parts, max_lists)),
    }


def most_pairs(bucket: int) -> int:
    """Of trees and heads, for which a step's arrays have room."""
    return min(MAX_PAIRS, max(LEAST_PAIRS, TREE_HEADS * bucket))


def lora_fields(bucket: int, prefix: str) -> Fields:
    """What `lora_arrays` takes of a `Packed`."""
    ints = {"counts": (2,), "adapted_T": (bucket,), "tiles": (bucket, TILE_FIELDS)}
    pairs = (torch.int64, (bucket * MAX_LORAS, PAIR_FIELDS))
    return {
        f"{prefix}lora_pairs": pairs,
        **int_fields({f"{prefix}lora_{name}": shape for name, shape in ints.items()}),
    }


def lora_arrays(
    packed: Packed, prefix: str
) -> tuple[LoraArrays[Tensor, Tensor], LoraArrays[Ints, Longs]]:
    """A step's LoRAs on the device and on the host."""
    names = {name: f"{prefix}lora_{name}" for name in ("counts", "adapted_T", "tiles", "pairs")}
    return (
        LoraArrays(**{name: packed.device[field] for name, field in names.items()}),
        LoraArrays(**{name: packed.host[field] for name, field in names.items()}),
    )


class LogitsInputs:
    """What `Backend.logits` needs of rows: their number, int32 [1], and their LoRAs."""

    def __init__(self, bucket: int, device: torch.device, calls: Device) -> None:
        fields = {**lora_fields(bucket, ""), "num_rows": (torch.int32, (1,))}
        self._packed = Packed(fields, device, calls)
        self.num_rows: Tensor = self._packed.device["num_rows"]
        self.lora, self._host_lora = lora_arrays(self._packed, "")

    def upload(self, uses: Sequence[LoraUse], num_rows: int) -> Loras | None:
        """Lays them out and enqueues the copy. No other may read the host's side any more."""
        self._packed.host["num_rows"][0] = num_rows
        loras = Loras.of(uses)
        if loras is not None:
            plan_lora(uses, num_rows, self._host_lora)
        self._packed.upload(1)
        return loras


def _selected(uses: Sequence[LoraUse], outputs: Sequence[int]) -> list[LoraUse]:
    """The same over some of the tokens: their places in the step, rising."""
    selected = []
    for use in uses:
        start, end = bisect_left(outputs, use.start), bisect_left(outputs, use.end)
        if start < end:
            selected.append(use._replace(start=start, end=end))
    return selected
