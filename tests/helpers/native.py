"""Small random models of any shape on the native backend and in torch, without files.

Everything that the library reads or writes lies before a page that nobody may touch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lorastack.kernels.linear import Dense, pack_dense
from lorastack.kernels.native.matrix import PackedMatrix, pack_matrix, pack_pair
from lorastack.kernels.ops import Ops
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.kernels.segmented_lora import GroupLora, TargetLora
from lorastack.layout import GROUPS, LM_HEAD, ModelShapes
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LM_HEAD_GROUP, LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.native import NativeBackend
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch, RowSpan
from lorastack.model.kv import KVCache
from lorastack.model.weights import DecoderWeights, LayerWeights, Pack, Packing
from tests.helpers.guarded import guarded, guarded_bytes
from tests.helpers.isas import Variant

CPU = torch.device("cpu")
Form = TypeVar("Form")  # a backend's form of the weights


def kinds(dtype: torch.dtype) -> tuple[Kind | None, ...]:
    """What the weights may be quantised to: nothing in float32."""
    return (None,) if dtype == torch.float32 else (None, *Kind)


class GuardedBackend(NativeBackend):
    """Its memory for states and its scratch memory, which is as small as the library asks for, are
    full of NaN and end before a page that nobody may touch."""

    def _padded(self, num_rows: int) -> Tensor:
        like = super()._padded(num_rows)
        return guarded_bytes(like.nbytes).view(like.dtype).view(like.shape)

    def _scratch_of(self, nbytes: int) -> int:
        aligned = -(-nbytes // 64) * 64
        self._scratch = guarded_bytes(aligned)
        return self._scratch.data_ptr()


@dataclass(frozen=True)
class Twins:
    """One model twice: native, and in torch and float32 from the same rounded weights."""

    config: DecoderConfig
    native: Backend
    reference: Backend

    @property
    def dtype(self) -> torch.dtype:
        return self.native.dtype

    def caches(self, num_pages: int, page_size: int) -> tuple[KVCache, KVCache]:
        """For `native` and for `reference`, full of NaN."""
        native = self.native.make_kv(num_pages, page_size)
        native.data = guarded(native.data.fill_(torch.nan))
        reference = self.reference.make_kv(num_pages, page_size)
        reference.data.fill_(torch.nan)
        return native, reference


def config_of(
    shapes: ModelShapes, *, window: int | None = None, biases: bool = False
) -> DecoderConfig:
    exponent = torch.arange(0, shapes.head_dim, 2).float() / shapes.head_dim
    return DecoderConfig(
        shapes=shapes,
        rms_eps=1e-5,
        window=window,
        attention_bias=biases,
        mlp_bias=biases,
        inv_freq=1e4**-exponent,
        rope_scale=1.0,
        context_limit=shapes.max_context,
    )


def twins(
    config: DecoderConfig,
    variant: Variant,
    seed: int,
    poison: float | None = None,
    kind: Kind | None = None,
) -> Twins:
    """Random weights, quantised to `kind`. poison: a value in the embedding of token 0."""
    (isa, dtype), head = variant, head_kind(kind)
    packing = Packing(
        dense=_packed(partial(pack_matrix, kind=kind)),
        pair=_packed(partial(pack_pair, kind=kind)),
        head=_packed(partial(pack_matrix, kind=head)),
        copies=True,
    )
    dense = partial(_dense, kind)
    plainly = Packing(dense, pair=dense, head=partial(_dense, head), copies=True)
    native = _weights(config, dtype, dtype, seed, packing, poison)
    plain = _weights(config, dtype, torch.float32, seed, plainly, poison)
    return Twins(
        config,
        GuardedBackend(config, native, dtype, isa, kind),
        TorchBackend(config, plain, CPU, torch.float32, Ops(), kind),
    )


def _packed(pack: Pack[PackedMatrix]) -> Pack[PackedMatrix]:
    def packed(weight_OI: Tensor, bias_O: Tensor | None) -> PackedMatrix:
        matrix = pack(weight_OI, bias_O)
        bias = None if matrix.bias is None else guarded(matrix.bias)
        scales = None if matrix.scales is None else guarded(matrix.scales)
        return replace(matrix, panels=guarded(matrix.panels), bias=bias, scales=scales)

    return packed


def _dense(kind: Kind | None, weight_OI: Tensor, bias_O: Tensor | None) -> Dense:
    return pack_dense(weight_OI.float(), None if bias_O is None else bias_O.float(), kind=kind)


def _weights(
    config: DecoderConfig,
    dtype: torch.dtype,
    kept: torch.dtype,
    seed: int,
    packing: Packing[Form],
    poison: float | None,
) -> DecoderWeights[Form]:
    """The same numbers, of `dtype`, for the same seed, in whatever form `packing` makes of them.

    kept: dtype of what is not packed.
    """
    shapes = config.shapes
    generator = torch.Generator().manual_seed(seed)
    pack = packing.dense

    def vector(size: int, mean: float) -> Tensor:
        return (mean + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    def matrix(targets: Sequence[str], biased: bool) -> tuple[Tensor, Tensor | None]:
        sizes = [shapes.target_shape(target) for target in targets]
        outputs, inputs = sum(size[0] for size in sizes), sizes[0][1]
        weight_OI = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return weight_OI.to(dtype), vector(outputs, 0.0) if biased else None

    layers = tuple(
        LayerWeights(
            index=index,
            attention_norm=guarded(vector(shapes.hidden_size, 1.0).to(kept)),
            qkv=pack(*matrix(GROUPS[0], config.attention_bias)),
            o=pack(*matrix(GROUPS[1], config.attention_bias)),
            mlp_norm=guarded(vector(shapes.hidden_size, 1.0).to(kept)),
            gate_up=packing.pair(*matrix(GROUPS[2], config.mlp_bias)),
            down=pack(*matrix(GROUPS[3], config.mlp_bias)),
        )
        for index in range(shapes.num_layers)
    )
    embed_VH = torch.randn(shapes.vocab_size, shapes.hidden_size, generator=generator).to(dtype)
    if poison is not None:
        embed_VH[0, 0] = poison
    norm = guarded(vector(shapes.hidden_size, 1.0).to(kept))
    return DecoderWeights(
        guarded(embed_VH.to(kept)), layers, norm, packing.head(*matrix((LM_HEAD,), False))
    )


Uses = tuple[tuple[int, float], ...]  # places in a list of adapters, with scales


def random_lora(
    shapes: ModelShapes, dtype: torch.dtype, chance: random.Random, ranks: Sequence[int]
) -> tuple[LoraWeights, LoraWeights]:
    """Any targets, each of any of these ranks: as `dtype`, and the same numbers in float32."""
    generator = torch.Generator().manual_seed(chance.randrange(2**20))
    mine: dict[tuple[int, int], GroupLora] = {}
    plain: dict[tuple[int, int], GroupLora] = {}
    places = [(layer, group) for layer in range(shapes.num_layers) for group in range(len(GROUPS))]
    for place in (*places, LM_HEAD_GROUP):
        names = (LM_HEAD,) if place == LM_HEAD_GROUP else GROUPS[place[1]]
        chosen = [index for index in range(len(names)) if chance.random() < 0.7]
        if not chosen:
            continue
        inputs, start, targets = shapes.target_shape(names[0])[1], 0, []
        for index in chosen:
            rank, outputs = chance.choice(ranks), shapes.target_shape(names[index])[0]
            b_OR = torch.randn(outputs, rank, generator=generator) / max(rank, 1) ** 0.5
            scale = chance.choice((0.5, -1.0))
            targets.append(TargetLora(index, slice(start, start + rank), b_OR.to(dtype), scale))
            start += rank
        a_RI = (torch.randn(start, inputs, generator=generator) / inputs**0.5).to(dtype)
        mine[place] = _group(a_RI, targets, dtype)
        plain[place] = _group(a_RI, targets, torch.float32)
    return LoraWeights(mine, None), LoraWeights(plain, None)


def _group(a_RI: Tensor, targets: Sequence[TargetLora], dtype: torch.dtype) -> GroupLora:
    return GroupLora(
        guarded(a_RI.to(dtype)),
        tuple(replace(target, b_OR=guarded(target.b_OR.to(dtype))) for target in targets),
    )


@dataclass(frozen=True)
class RowPart:
    """Tokens of one row in a step. parents: None for a chain; uses: its stack."""

    ids: list[int]
    committed: int
    pages: Sequence[int]
    uses: Uses = ()
    parents: tuple[int, ...] | None = None


def run(
    backend: Backend, loras: Sequence[LoraWeights], kv: KVCache, parts: Sequence[RowPart]
) -> list[Tensor]:
    """Logits [T, V] of every part, all in one step."""
    every = range(sum(len(part.ids) for part in parts))
    outputs = backend.forward(lay_out(loras, parts, every), kv)
    return list(outputs.logits_XV.split_with_sizes([len(part.ids) for part in parts]))


def lay_out(
    loras: Sequence[LoraWeights], parts: Sequence[RowPart], outputs: Sequence[int]
) -> ForwardBatch:
    rows, segments, start = [], [], 0
    for part in parts:
        end = start + len(part.ids)
        rows.append(RowSpan(start, end, part.pages, part.committed, part.parents))
        segments += [Segment(start, end, loras[which], scale) for which, scale in part.uses]
        start = end
    ids = [token for part in parts for token in part.ids]
    return ForwardBatch(ids, tuple(rows), outputs, LoraBatch(tuple(segments)))
