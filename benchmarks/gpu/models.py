"""Random models and adapters, made on the device: nothing is read and nothing downloaded."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.kernels.heads import HeadsWeights, PrivateWeights
from lorastack.kernels.packing import allocate, view
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.kernels.triton.weight import Weight, pack_weight
from lorastack.layout import EMBED, GROUPS, LAYER_TARGETS, LM_HEAD, NO_LAYER, ModelShapes, Part
from lorastack.model.backends.triton.backend import TritonBackend
from lorastack.model.backends.triton.device import Device
from lorastack.model.config import DecoderConfig
from lorastack.model.weights import DecoderWeights, Dense, LayerWeights, Pack, Packing
from tests.helpers.native import config_of

STRENGTH = 0.3  # of LoRAs: what they add beside what they add it to


def packing_of(kind: Kind | None = None) -> Packing[Weight]:
    """As the Triton backend lays weights out."""
    dense, head = partial(pack_weight, kind=kind), partial(pack_weight, kind=head_kind(kind))
    return Packing(dense, pair=dense, head=head, copies=kind is not None)


def random_weights(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, packing: Packing[Dense]
) -> DecoderWeights[Dense]:
    """Norms around 1, logits well spread."""
    shapes = config.shapes

    def matrix(pack: Pack[Dense], *targets: str, scale: float = 1.5) -> Dense:
        outputs = sum(shapes.target_shape(target)[0] for target in targets)
        inputs = shapes.target_shape(targets[0])[1]
        weight_OI = torch.randn(outputs, inputs, dtype=dtype, device=device)
        return pack(weight_OI.mul_(scale * inputs**-0.5), None)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(shapes.hidden_size, dtype=dtype, device=device)

    qkv, o, gate_up, down = GROUPS
    layers = tuple(
        LayerWeights(
            index=index,
            attention_norm=norm(),
            qkv=matrix(packing.dense, *qkv),
            o=matrix(packing.dense, *o, scale=4.0),
            mlp_norm=norm(),
            gate_up=matrix(packing.pair, *gate_up),
            down=matrix(packing.dense, *down, scale=4.0),
        )
        for index in range(shapes.num_layers)
    )
    embed_VH = torch.randn(shapes.vocab_size, shapes.hidden_size, dtype=dtype, device=device)
    return DecoderWeights(embed_VH.mul_(0.5), layers, norm(), matrix(packing.head, LM_HEAD))


def random_backend(
    shapes: ModelShapes,
    dtype: torch.dtype,
    device: torch.device,
    kind: Kind | None = None,
    calls: Device | None = None,
) -> TritonBackend:
    """calls: see `TritonBackend`."""
    config = config_of(shapes)
    weights = random_weights(config, dtype, device, packing_of(kind))
    return TritonBackend(config, weights, device, dtype, kind, calls)


def random_lora(
    shapes: ModelShapes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    digest: str = "",
    rank: int = 16,
    targets: tuple[str, ...] = LAYER_TARGETS,
) -> DeviceAdapter:
    """In one flat buffer, as adapters lie on a device. It visibly changes the output."""
    sizes: dict[tuple[int, str, Part], tuple[int, ...]] = {}
    for target in targets:
        outputs, inputs = shapes.target_shape(target)
        once = target in (EMBED, LM_HEAD)
        for layer in (NO_LAYER,) if once else range(shapes.num_layers):
            sizes[layer, target, Part.A] = (rank, inputs)
            sizes[layer, target, Part.B] = (outputs, rank)
    scales = {(layer, target): 1.0 for layer, target, _ in sizes}
    layout, host = allocate(sizes, scales, 0, dtype=dtype)
    buffer = torch.zeros(len(host), dtype=dtype, device=device)
    for key, (_, columns) in sizes.items():
        is_a = key[2] is Part.A
        spread = 1.0 if is_a and key[1] == EMBED else columns**-0.5
        view(buffer, layout, key).normal_(0, spread if is_a else STRENGTH * spread)
    return DeviceAdapter(digest=digest, buffer=buffer, layout=layout)


def random_heads(
    shapes: ModelShapes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_heads: int = 4,
    num_outputs: int = 4096,
    num_blocks: int = 1,
    private_rank: int = 0,
) -> HeadsWeights:
    """Close to the identity. num_outputs: of the vocabulary, or all of it if it is smaller."""
    hidden = shapes.hidden_size
    count = min(num_outputs, shapes.vocab_size)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * (0.3 * hidden**-0.5)).to(dtype)

    ids_N = torch.randperm(shapes.vocab_size, device=device)[:count].sort().values
    return HeadsWeights(
        random(num_blocks, num_heads, hidden, hidden),
        random(num_blocks, num_heads, hidden),
        random(count, hidden),
        ids_N,
        random_private(shapes, dtype, device, num_heads, num_blocks, private_rank)
        if private_rank
        else None,
    )


def random_private(
    shapes: ModelShapes,
    dtype: torch.dtype,
    device: torch.device,
    num_heads: int,
    num_blocks: int,
    rank: int,
) -> PrivateWeights:
    """A private part of such heads."""
    hidden = shapes.hidden_size
    a_LKRH = torch.randn(num_blocks, num_heads, rank, hidden, device=device) * hidden**-0.5
    b_LKHR = torch.randn(num_blocks, num_heads, hidden, rank, device=device) * rank**-0.5
    return PrivateWeights(a_LKRH.to(dtype), b_LKHR.to(dtype))
