"""A step as Triton kernels: one copy to the device, one graph, one copy back.

A token's bits depend on its own row alone, in bfloat16 as in float32: every kernel adds in an order
that neither the number of tokens nor the bucket changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorastack.errors import FailedPreconditionError, Reason
from lorastack.kernels.heads import TopTokens
from lorastack.kernels.linear import copy_rows
from lorastack.kernels.ops import Ops
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.kernels.segmented_lora import GroupLora
from lorastack.kernels.triton.lora_plan import AdapterTable, LoraUse
from lorastack.kernels.triton.weight import Weight, pack_weight
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LM_HEAD_GROUP, EmbeddingLora, LoraWeights
from lorastack.model.backends.triton.device import Device, device_of
from lorastack.model.backends.triton.graphs import CAPTURED_AT
from lorastack.model.backends.triton.heads import (
    launch_heads,
    plan_heads,
    top_of,
    warm_heads,
)
from lorastack.model.backends.triton.inputs import (
    BUCKETS,
    LogitsInputs,
    Loras,
    bucket_of,
    most_pairs,
)
from lorastack.model.backends.triton.layers import LoraLaunch, Model, add_logits, launch_step
from lorastack.model.backends.triton.ops import TritonOps
from lorastack.model.backends.triton.reserve import STEP_TOKENS
from lorastack.model.backends.triton.steps import StepMemory, Steps
from lorastack.model.backends.triton.workspace import LoraMemory
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch, Outputs, RowSpan
from lorastack.model.kv import KVCache
from lorastack.model.weights import DecoderWeights, Packing, load_weights

CAPTURED_TOKENS = 64  # of steps that are captured at the start, others by their third use

log = logging.getLogger(__name__)


class TritonBackend:
    """See `Backend`. Owns weights, the memory of a step and its graphs.

    Its steps run on the current stream of the thread that calls it, one after the other.
    """

    name = "triton"

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights[Weight],
        device: torch.device,
        dtype: torch.dtype,
        kind: Kind | None = None,
        calls: Device | None = None,
    ) -> None:
        """kind: what the weights are quantised to. calls: the device's, made here if None."""
        self.shapes = config.shapes
        self.device = device
        self.dtype = dtype
        self.quantization = "" if kind is None else kind.value
        self.dynamic_rope_begin = config.dynamic_rope_begin
        self.overlaps = device.type != "cpu"  # the interpreter computes in the call
        self.ops: Ops = TritonOps(device)
        self._window = config.window
        self._calls = device_of(device) if calls is None else calls
        self._model = _model(config, weights, device)
        self._lora_memory = LoraMemory(config.shapes, device)
        self._tables: WeakKeyDictionary[LoraWeights, AdapterTable] = WeakKeyDictionary()
        self._logits_inputs: dict[int, LogitsInputs] = {}
        self._memory = StepMemory(config.shapes, dtype, kind, device)
        self._steps: WeakKeyDictionary[KVCache, Steps] = WeakKeyDictionary()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        kind: Kind | None = None,
    ) -> TritonBackend:
        """kind: what weights are quantised to. Raises what `load_weights` raises."""
        dense = partial(pack_weight, kind=kind)
        head = partial(pack_weight, kind=head_kind(kind))
        packing = Packing(dense, pair=dense, head=head, copies=kind is not None)
        weights = load_weights(checkpoint, config, device=device, dtype=dtype, packing=packing)
        return cls(config, weights, device, dtype, kind)

    def make_kv(self, num_pages: int, page_size: int) -> KVCache:
        """See `Backend`."""
        return KVCache(self.shapes, num_pages, page_size, self.dtype, self.device)

    @torch.inference_mode()
    def prepare(self, kv: KVCache) -> None:
        """See `Backend`. Compiles all kernels, and captures steps of few tokens.

        Raises FailedPreconditionError where kernels do not compile or run.
        """
        if not self._calls.captures:
            return
        log.info("getting kernels and graphs ready; the first start here takes longer: it compiles")
        try:
            self._try_all(kv)
        except Exception as error:
            short = isinstance(error, torch.OutOfMemoryError)
            remedy = "give --kv-memory less" if short else "--backend torch does without Triton"
            raise FailedPreconditionError(
                f"Triton's kernels do not run here: {error}; {remedy}", reason=Reason.INVALID_MODEL
            ) from error

    def _try_all(self, kv: KVCache) -> None:
        """With LoRAs and without, of lm_head and the embedding too, and with heads: what an adapter
        holds does not matter, nor what the steps write."""
        nothing, everything = LoraWeights({}, None), self._lora_of_nothing()
        for bucket in BUCKETS:
            table = range(-(-bucket // kv.page_size))
            if bucket > self.shapes.max_context or len(table) > kv.data.shape[1]:
                break
            uses = CAPTURED_AT if bucket <= CAPTURED_TOKENS else 1
            rows = (RowSpan(0, bucket, table, 0),)
            for lora, times in ((None, uses), (nothing, uses), (everything, 1)):
                segments = () if lora is None else (Segment(0, bucket, lora, 1.0),)
                batch = ForwardBatch([0] * bucket, rows, (bucket - 1,), LoraBatch(segments))
                for _ in range(times):
                    self.forward(batch, kv)
        step, results = self._steps_of(kv).of(1)
        warm_heads(step.memory.hidden_XH, step.accepted.ends_B, step.inputs.heads, results.drafts)

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv: KVCache, meanwhile: Callable[[], None] | None = None
    ) -> Outputs:
        """See `Backend`."""
        steps = self._steps_of(kv)
        step, results = steps.of(bucket_of(len(batch.token_ids)))
        inputs, num_outputs = step.inputs, len(batch.outputs)
        heads = plan_heads(batch.trees, most_pairs(inputs.bucket))
        self._calls.free_to_write()
        kind = inputs.fill(batch, self._uses(batch.lora), heads)
        inputs.upload()
        launch = partial(launch_step, self._model, step, self._lora_launch(kind, inputs.bucket))
        steps.graphs.run((inputs.bucket, kind), launch)
        if heads is not None:
            began = self._calls.mark()
            hidden_XH, ends_B = step.memory.hidden_XH, step.accepted.ends_B
            launch_heads(hidden_XH, ends_B, inputs.heads, heads, results.drafts)
            ended = self._calls.mark()
        num_drafts = 0 if heads is None else heads.num_drafts
        results.download(num_drafts)
        if self.overlaps and meanwhile is not None:
            meanwhile()
        self._calls.wait()
        drafted: Sequence[TopTokens | None] = ()
        heads_seconds = 0.0
        if heads is not None:
            drafted = top_of(heads, results.drafted(num_drafts), len(batch.trees))
            heads_seconds = self._calls.seconds(began, ended)
        logits_CXV = step.memory.logits_of(self._model.weights.lm_head, inputs.bucket)
        return Outputs(
            step.memory.hidden_XH[:num_outputs],
            logits_CXV[0, :num_outputs],
            *results.best(num_outputs),
            results.accepted(batch),
            moved=True,
            drafted=drafted,
            heads_seconds=heads_seconds,
        )

    @torch.inference_mode()
    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """See `Backend`."""
        lm_head, num_rows = self._model.weights.lm_head, len(hidden_XH)
        bucket = bucket_of(num_rows)
        inputs = self._logits_inputs.get(bucket)
        if inputs is None:
            inputs = self._logits_inputs[bucket] = LogitsInputs(bucket, self.device, self._calls)
        self._calls.free_to_write()
        kind = inputs.upload(self._uses(lora), num_rows)
        x_XH = hidden_XH.new_zeros(bucket, hidden_XH.shape[1])
        x_XH[:num_rows] = hidden_XH
        shape = (lm_head.plan.num_parts(bucket), bucket, lm_head.num_outputs)
        logits_CXV = torch.empty(shape, dtype=torch.float32, device=self.device)
        loras = self._lora_launch(kind, bucket)
        add_logits(x_XH, lm_head, logits_CXV, inputs.num_rows, inputs.lora, loras)
        return logits_CXV[0, :num_rows]

    def head_rows(self, ids: Sequence[int], out_NH: Tensor) -> None:
        """See `Backend`."""
        lm_head = self._model.weights.lm_head
        copy_rows(lambda ids_N: lm_head.rows(ids_N.to(self.device)), torch.tensor(ids), out_NH)

    def adopt(self, lora: LoraWeights) -> None:
        """See `Backend`."""
        self._table(lora)

    def _uses(self, lora: LoraBatch) -> list[LoraUse]:
        """The segments with their adapters' tables, which are made once an adapter."""
        return [
            LoraUse(each.start, each.end, self._table(each.weights), each.scale)
            for each in lora.segments
            if each.start < each.end
        ]

    def _table(self, weights: LoraWeights) -> AdapterTable:
        table = self._tables.get(weights)
        if table is None:
            embedding = None if weights.embedding is None else weights.embedding.group
            table = AdapterTable.of(weights.groups, embedding, self.shapes.num_layers, self.device)
            self._tables[weights] = table
        return table

    def _lora_of_nothing(self) -> LoraWeights:
        """Of rank 0, beside the layers."""
        size, vocab_size = self.shapes.hidden_size, self.shapes.vocab_size
        empty = partial(torch.empty, dtype=self.dtype, device=self.device)
        embedding = EmbeddingLora(empty(0, vocab_size), empty(size, 0), 1.0)
        return LoraWeights({LM_HEAD_GROUP: GroupLora(empty(0, size), ())}, embedding)

    def _lora_launch(self, kind: Loras | None, bucket: int) -> LoraLaunch | None:
        if kind is None:
            return None
        deltas = None
        if kind.lm_head:
            deltas = self._lora_memory.logit_deltas(max(bucket, STEP_TOKENS))
        return LoraLaunch(self.shapes, kind, self._lora_memory.shrunk(kind.room), deltas)

    def _steps_of(self, kv: KVCache) -> Steps:
        if kv not in self._steps:
            self._steps[kv] = Steps(
                self.shapes, self._window, kv, self._memory, self.device, self._calls
            )
        return self._steps[kv]


def _model(config: DecoderConfig, weights: DecoderWeights[Weight], device: torch.device) -> Model:
    """With tables of RoPE on the device."""
    dynamic = config.dynamic_rope_begin is not None
    positions_P = torch.arange(0 if dynamic else config.shapes.max_context, dtype=torch.float32)
    frequencies_F = config.inv_freq[0] if dynamic else config.inv_freq
    angle_PF = positions_P[:, None] * frequencies_F
    return Model(
        config.shapes,
        weights,
        config.rms_eps,
        config.rope_scale,
        angle_PF.cos().mul_(config.rope_scale).to(device),
        angle_PF.sin().mul_(config.rope_scale).to(device),
        config.inv_freq.to(device) if dynamic else None,
    )
