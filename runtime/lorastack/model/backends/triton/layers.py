"""The launches of a step, from token ids to samples: ten a layer without LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorastack.kernels.triton.accept import Accepted, accept, move_kv
from lorastack.kernels.triton.attention import AttentionWorkspace, attend
from lorastack.kernels.triton.attention_plan import AttentionShape
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
)
from lorastack.kernels.triton.samples import Sampled, sample
from lorastack.kernels.triton.weight import Weight
from lorastack.layout import ModelShapes
from lorastack.model.backends.triton.inputs import StepInputs
from lorastack.model.backends.triton.workspace import Workspace
from lorastack.model.weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class Model:
    """What all steps share. cos_PF, sin_PF: by position, times the rope scale, float32."""

    shapes: ModelShapes
    weights: DecoderWeights[Weight]
    rms_eps: float
    cos_PF: Tensor
    sin_PF: Tensor


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


def launch_step(model: Model, step: Step) -> None:
    """Enqueues it. KV of all tokens is written, and that of accepted nodes moved."""
    inputs, memory, shapes = step.inputs, step.memory, model.shapes
    bucket, count, weights = inputs.bucket, inputs.num_tokens, model.weights
    hidden_TH, x_TH = memory.hidden_TH[:bucket], memory.x_TH[:bucket]
    q_TX, context_TX = memory.q_TX[:bucket], memory.context_TX[:bucket]
    inner_TI = memory.inner_TI[:bucket]
    q_THD = q_TX.view(bucket, shapes.num_heads, shapes.head_dim)
    position_T, slot_T = inputs.attention.position_T, inputs.attention.slot_T
    rotations = Rotations(model.cos_PF, model.sin_PF, position_T)

    def project(x_TI: Tensor, weight: Weight) -> Projection:
        parts_CTO = memory.parts_of(weight, bucket)
        matmul(x_TI, weight, parts_CTO, count)
        return Projection(parts_CTO, weight.bias_O)

    embed(inputs.token_ids_T, weights.embed_VH, hidden_TH, count)
    before: Projection | None = None
    for layer in weights.layers:
        kv = step.kv[layer.index]
        add_norm(before, hidden_TH, layer.attention_norm, x_TH, count, model.rms_eps)
        rope_write(project(x_TH, layer.qkv), rotations, slot_T, q_THD, kv, count)
        attend(q_TX, kv, inputs.attention, step.attention, context_TX, step.attention_shape, bucket)
        added = project(context_TX, layer.o)
        add_norm(added, hidden_TH, layer.mlp_norm, x_TH, count, model.rms_eps)
        silu_mul(project(x_TH, layer.gate_up), inner_TI, count)
        before = project(inner_TI, layer.down)
    assert before is not None
    hidden_XH, wanted = memory.hidden_XH[:bucket], inputs.num_outputs
    gather_norm(
        before, hidden_TH, inputs.outputs_X, weights.norm, hidden_XH, wanted, model.rms_eps
    )
    logits_CXV = memory.logits_of(weights.lm_head, bucket)
    matmul(hidden_XH, weights.lm_head, logits_CXV, wanted)
    if len(logits_CXV) > 1:
        add_parts(Projection(logits_CXV), logits_CXV[0], wanted)
    sample(logits_CXV[0], inputs.nodes, memory.keys_XS[:bucket], step.sampled, bucket)
    accept(step.sampled.tokens_X, inputs.trees, step.accepted, bucket, step.max_nodes)
    if bucket > 1:  # one token is no tree with anything to move
        move_kv(step.kv, step.accepted, inputs.slots, inputs.trees.num_trees, bucket)
