"""Device memory that steps take beside weights, KV and adapters, known before any is taken."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from lorastack.config import MIB
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.weight import MatmulPlan
from lorastack.layout import GROUPS, LM_HEAD, ModelShapes
from lorastack.model.backends.triton.graphs import MAX_GRAPHS
from lorastack.model.backends.triton.inputs import BUCKETS, LEAST_ROOM
from lorastack.model.backends.triton.workspace import (
    LoraMemory,
    Products,
    Workspace,
    attention_workspace,
)

STEP_TOKENS = BUCKETS[-1]  # for which memory is made at first
# Allowances: for the driver, binaries and what heads' calls allocate; and for a graph of some 600
# launches.
CONTEXT_NBYTES = 512 * MIB
GRAPH_NBYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class Product:
    """What memory needs to know of a weight."""

    num_outputs: int
    plan: MatmulPlan


def products_of(shapes: ModelShapes, dtype: torch.dtype, kind: Kind | None) -> Products[Product]:
    """kind: what weights are quantised to."""

    def product(targets: tuple[str, ...], kind: Kind | None) -> Product:
        sizes = [shapes.target_shape(target) for target in targets]
        outputs = sum(size[0] for size in sizes)
        return Product(outputs, MatmulPlan.of(outputs, sizes[0][1], dtype, kind))

    layer = tuple(product(group, kind) for group in GROUPS)
    return Products(layer, product((LM_HEAD,), head_kind(kind)))


def reserved_nbytes(shapes: ModelShapes, dtype: torch.dtype, kind: Kind | None) -> int:
    """See the module. Larger rooms for LoRAs are in CONTEXT_NBYTES."""
    meta = torch.device("meta")
    shape = AttentionShape.of(shapes, 1, None, dtype)  # neither pages nor a window matter
    attention, _ = attention_workspace(shape, shapes.max_context, 0, meta)
    memory = Workspace.of(shapes, products_of(shapes, dtype, kind), STEP_TOKENS, dtype, meta)
    loras = LoraMemory(shapes, meta)
    nbytes = sum(int(getattr(memory, each.name).nbytes) for each in fields(memory))
    nbytes += loras.shrunk(4 * LEAST_ROOM).nbytes + loras.logit_deltas(STEP_TOKENS).nbytes
    nbytes += attention.sums.nbytes + attention.softmax.nbytes
    nbytes += 4 * shapes.max_context * shapes.head_dim  # cosines and sines, float32
    return nbytes + CONTEXT_NBYTES + MAX_GRAPHS * GRAPH_NBYTES
