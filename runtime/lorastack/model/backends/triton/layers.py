"""The launches of a step, from token ids to samples: ten a layer without LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorastack.kernels.triton.accept import Accepted, accept, move_kv
from lorastack.kernels.triton.attention import AttentionWorkspace, attend
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.lora import add_embedding, expand, shrink
from lorastack.kernels.triton.lora_plan import LoraArrays, embedding_site, site_of
from lorastack.kernels.triton.matmul import matmul
from lorastack.kernels.triton.pointwise import (
    Projection,
    Rotations,
    add_norm,
    add_parts,
    embed,
    gather_norm,
    rope_write,
    silu_mul,
    turn,
)
from lorastack.kernels.triton.samples import Sampled, sample
from lorastack.kernels.triton.weight import Weight
from lorastack.layout import GROUPS, LM_HEAD, ModelShapes
from lorastack.lora.weights import LM_HEAD_GROUP
from lorastack.model.backends.triton.inputs import Loras, StepInputs
from lorastack.model.backends.triton.workspace import Workspace
from lorastack.model.weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class Model:
    """What all steps share. cos_PF, sin_PF: by position, times the rope scale, float32. With
    dynamic RoPE they are made for each step, from inv_freq_PF."""

    shapes: ModelShapes
    weights: DecoderWeights[Weight]
    rms_eps: float
    rope_scale: float
    cos_PF: Tensor
    sin_PF: Tensor
    inv_freq_PF: Tensor | None


@dataclass(frozen=True, slots=True)
class Step:
    """Where one bucket's steps read and write."""

    inputs: StepInputs
    memory: Workspace
    attention_shape: AttentionShape
    attention: AttentionWorkspace
    sampled: Sampled
    accepted: Accepted
    max_nodes: int
    kv: Tensor


@dataclass(frozen=True, slots=True)
class LoraLaunch:
    """Launches of a step's LoRAs. shrunk_CS: of the room that `kind` names; logit_deltas: [X, V],
    None where no LoRA adapts lm_head."""

    shapes: ModelShapes
    kind: Loras
    shrunk_CS: Tensor
    logit_deltas: Tensor | None

    def add(
        self,
        arrays: LoraArrays[Tensor, Tensor],
        x_TI: Tensor,
        group: tuple[int, int],
        delta_TO: Tensor,
    ) -> None:
        """What LoRAs add to a group's outputs. group: see `LoraWeights.groups`."""
        shapes, (bucket, inputs) = self.shapes, x_TI.shape
        site = site_of(*group, shapes.num_layers)
        targets = (LM_HEAD,) if group == LM_HEAD_GROUP else GROUPS[group[1]]
        outputs = [shapes.target_shape(target)[0] for target in targets]
        shrink(x_TI, arrays, site, self.shrunk_CS, bucket)
        expand(self.shrunk_CS, arrays, site, outputs, inputs, x_TI.dtype, delta_TO, bucket)

    def add_embedding(self, inputs: StepInputs, hidden_TH: Tensor, dtype: torch.dtype) -> None:
        """What LoRAs add to the embedded tokens."""
        site, shapes = embedding_site(self.shapes.num_layers), self.shapes
        ids_T, arrays, bucket = inputs.token_ids_T, inputs.lora, inputs.bucket
        add_embedding(ids_T, arrays, site, shapes.vocab_size, dtype, hidden_TH, bucket)


QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741  indices into layout.GROUPS


def launch_step(model: Model, step: Step, loras: LoraLaunch | None) -> None:
    """Enqueues it. KV of all tokens is written, and that of accepted nodes moved."""
    inputs, memory, shapes = step.inputs, step.memory, model.shapes
    bucket, count, weights, eps = inputs.bucket, inputs.num_tokens, model.weights, model.rms_eps
    hidden_TH, x_TH = memory.hidden_TH[:bucket], memory.x_TH[:bucket]
    q_TX, context_TX = memory.q_TX[:bucket], memory.context_TX[:bucket]
    inner_TI = memory.inner_TI[:bucket]
    q_THD = q_TX.view(bucket, shapes.num_heads, shapes.head_dim)
    attention = inputs.attention
    rotations = _rotations(model, step)

    def project(x_TI: Tensor, weight: Weight, layer: int, group: int) -> Projection:
        parts_CTO = memory.parts_of(weight, bucket)
        matmul(x_TI, weight, parts_CTO, count)
        if loras is None:
            return Projection(parts_CTO, weight.bias_O)
        delta_TO = memory.deltas_of(weight, bucket)
        loras.add(inputs.lora, x_TI, (layer, group), delta_TO)
        return Projection(parts_CTO, weight.bias_O, delta_TO, inputs.lora.adapted_T)

    embed(inputs.token_ids_T, weights.embed_VH, hidden_TH, count)
    if loras is not None and loras.kind.embedding:
        loras.add_embedding(inputs, hidden_TH, model.weights.embed_VH.dtype)
    before: Projection | None = None
    for layer in weights.layers:
        kv, index = step.kv[layer.index], layer.index
        add_norm(before, hidden_TH, layer.attention_norm, x_TH, count, eps)
        qkv = project(x_TH, layer.qkv, index, QKV)
        rope_write(qkv, rotations, attention.slot_T, q_THD, kv, count)
        attend(q_TX, kv, attention, step.attention, context_TX, step.attention_shape, bucket)
        added = project(context_TX, layer.o, index, O)
        add_norm(added, hidden_TH, layer.mlp_norm, x_TH, count, eps)
        silu_mul(project(x_TH, layer.gate_up, index, GATE_UP), inner_TI, count)
        before = project(inner_TI, layer.down, index, DOWN)
    assert before is not None
    hidden_XH, wanted = memory.hidden_XH[:bucket], inputs.num_outputs
    gather_norm(before, hidden_TH, inputs.outputs_X, weights.norm, hidden_XH, wanted, eps)
    _sample(model, step, loras)


def _rotations(model: Model, step: Step) -> Rotations:
    inputs, memory = step.inputs, step.memory
    position_T, bucket = inputs.attention.position_T, inputs.bucket
    if model.inv_freq_PF is None:
        return Rotations(model.cos_PF, model.sin_PF, position_T)
    cos_TF, sin_TF = memory.cos_TF[:bucket], memory.sin_TF[:bucket]
    scale, count = model.rope_scale, inputs.num_tokens
    turn(model.inv_freq_PF, position_T, inputs.last_T, scale, cos_TF, sin_TF, count)
    return Rotations(cos_TF, sin_TF, memory.places_T)


def _sample(model: Model, step: Step, loras: LoraLaunch | None) -> None:
    """Logits of the outputs, their samples, what is accepted, and KV in its place."""
    inputs, memory, lm_head = step.inputs, step.memory, model.weights.lm_head
    bucket, hidden_XH = inputs.bucket, step.memory.hidden_XH[: inputs.bucket]
    logits_CXV = memory.logits_of(lm_head, bucket)
    add_logits(hidden_XH, lm_head, logits_CXV, inputs.num_outputs, inputs.output_lora, loras)
    sample(logits_CXV[0], inputs.nodes, memory.keys_XS[:bucket], step.sampled, bucket)
    accept(step.sampled.tokens_X, inputs.trees, step.accepted, bucket, step.max_nodes)
    if bucket > 1:  # one token is no tree with anything to move
        move_kv(step.kv, step.accepted, inputs.slots, inputs.trees, bucket)


def add_logits(
    hidden_XH: Tensor,
    lm_head: Weight,
    logits_CXV: Tensor,
    num_outputs: Tensor,
    arrays: LoraArrays[Tensor, Tensor],
    loras: LoraLaunch | None,
) -> None:
    """Leaves the logits in the first part. arrays: of LoRAs, over the outputs."""
    matmul(hidden_XH, lm_head, logits_CXV, num_outputs)
    projection = Projection(logits_CXV)
    if loras is not None and loras.logit_deltas is not None:
        delta_XV = loras.logit_deltas[: logits_CXV.shape[1]]
        loras.add(arrays, hidden_XH, LM_HEAD_GROUP, delta_XV)
        projection = Projection(logits_CXV, None, delta_XV, arrays.adapted_T)
    elif len(logits_CXV) == 1:
        return
    add_parts(projection, logits_CXV[0], num_outputs)
