"""Where the steps over one KV cache read and write, by their buckets, and their graphs."""

from __future__ import annotations

from functools import partial

import torch

from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton.accept import Accepted
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.launch import power_of_two
from lorastack.layout import ModelShapes
from lorastack.model.backends.triton.device import Device
from lorastack.model.backends.triton.graphs import Graphs
from lorastack.model.backends.triton.inputs import Limits, StepInputs
from lorastack.model.backends.triton.layers import Step
from lorastack.model.backends.triton.reserve import STEP_TOKENS, products_of
from lorastack.model.backends.triton.results import StepResults
from lorastack.model.backends.triton.workspace import Workspace, attention_workspace
from lorastack.model.kv import KVCache


class StepMemory:
    """The workspace that all steps share; a larger one for larger steps, when there are any."""

    def __init__(
        self, shapes: ModelShapes, dtype: torch.dtype, kind: Kind | None, device: torch.device
    ) -> None:
        """kind: what weights are quantised to."""
        self._shapes = shapes
        self._dtype = dtype
        self._device = device
        self._products = products_of(shapes, dtype, kind)
        self._made: Workspace | None = None  # steps keep those before

    def of(self, bucket: int) -> Workspace:
        """What holds steps of this bucket."""
        if self._made is None or len(self._made.hidden_TH) < bucket:
            tokens = max(bucket, STEP_TOKENS)
            self._made = Workspace.of(
                self._shapes, self._products, tokens, self._dtype, self._device
            )
        return self._made


class Steps:
    """The steps over one KV cache. Lives no longer than that: it keeps the tensor alone."""

    def __init__(
        self,
        shapes: ModelShapes,
        window: int | None,
        kv: KVCache,
        memory: StepMemory,
        device: torch.device,
        calls: Device,
    ) -> None:
        self.graphs = Graphs(calls)
        self._kv = kv.data
        self._memory = memory
        self._device = device
        self._calls = calls
        self._shape = AttentionShape.of(shapes, kv.page_size, window, kv.data.dtype)
        self._attention, max_parts = attention_workspace(
            self._shape, shapes.max_context, _programs(device), device
        )
        self._limits = Limits(self._shape, max_parts, -(-shapes.max_context // kv.page_size))
        self._by_bucket: dict[int, tuple[Step, StepResults]] = {}

    def of(self, bucket: int) -> tuple[Step, StepResults]:
        """Where steps of this bucket read and write."""
        if bucket not in self._by_bucket:
            self._by_bucket[bucket] = self._make(bucket)
        return self._by_bucket[bucket]

    def _make(self, bucket: int) -> tuple[Step, StepResults]:
        results = StepResults(bucket, self._device, self._calls)
        ints = partial(torch.zeros, bucket, dtype=torch.int32, device=self._device)
        step = Step(
            StepInputs(bucket, self._limits, self._device, self._calls),
            self._memory.of(bucket),
            self._shape,
            self._attention,
            results.sampled,
            Accepted(lengths_B=ints(), ends_B=ints(), path_X=ints()),
            power_of_two(bucket),
            self._kv,
        )
        return step, results


def _programs(device: torch.device) -> int:
    """How many of attention's programs a device holds at once."""
    if device.type != "cuda":
        return 8
    return 3 * int(torch.cuda.get_device_properties(device).multi_processor_count)
