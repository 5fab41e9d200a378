"""The decoder's weights, read from a checkpoint straight into the layout the step loop wants.

q, k and v are one matrix, gate and up another: a layer is four dense calls.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.kernels.native.memory import give_back
from lorastack.kernels.quantize import NotFiniteError
from lorastack.layout import ModelShapes
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig

MODULES = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip

EMBED_WEIGHT, LM_HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"
ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
# Tensors of Medusa heads beside a backbone begin so; see startup.own_heads.
HEADS_TENSORS_PREFIX = "medusa_head."

log = logging.getLogger(__name__)

Dense = TypeVar("Dense")  # a backend's own kind of packed weight
Pack = Callable[[Tensor, Tensor | None], Dense]  # weight [out, in], bias [out]


@dataclass(frozen=True, slots=True)
class Packing(Generic[Dense]):
    """How a backend lays weights out. pair: gate and up; head: lm_head.

    copies: it keeps nothing of the weight that it is given, so that the next one is read into the
    same memory: memory that a process touches for the first time is several times slower.
    """

    dense: Pack[Dense]
    pair: Pack[Dense]
    head: Pack[Dense]
    copies: bool


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[Dense]):
    """index: which layer; qkv: [q + k + v, H]; gate_up: [2 I, H]; norms: [H]."""

    index: int
    attention_norm: Tensor
    qkv: Dense
    o: Dense
    mlp_norm: Tensor
    gate_up: Dense
    down: Dense


@dataclass(frozen=True, slots=True)
class DecoderWeights(Generic[Dense]):
    """embed_VH and lm_head hold the same numbers when tied, in two layouts."""

    embed_VH: Tensor
    layers: tuple[LayerWeights[Dense], ...]
    norm: Tensor
    lm_head: Dense


def check_tensors(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Compare the checkpoint's headers with what `load_weights` is going to read.

    Raises InvalidArgumentError naming a tensor that is missing, misshapen, of a dtype that is not
    read, or not known to this decoder: such a tensor may change the output.
    """
    known: set[str] = set()
    for name, shape in _tensors(checkpoint, config):
        checkpoint.check(name, shape)
        known.add(name)
    for name in sorted(checkpoint.tensors.keys() - known):
        is_head = config.has_heads and name.startswith(HEADS_TENSORS_PREFIX)
        if not is_head and not name.endswith("rotary_emb.inv_freq"):
            raise InvalidArgumentError(
                f"tensor {name} is not known to {config.shapes.architecture} "
                "with this config.json: use the model's original checkpoint",
                reason=Reason.UNSUPPORTED_MODEL,
            )


def _tensors(
    checkpoint: Checkpoint, config: DecoderConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that are read. Tied, lm_head and embedding may be one."""
    shapes = config.shapes
    hidden = (shapes.hidden_size,)
    vocabulary = [
        name for name in (EMBED_WEIGHT, LM_HEAD_WEIGHT) if name in checkpoint.tensors
    ] or [EMBED_WEIGHT]
    for name in vocabulary if shapes.tie_word_embeddings else (EMBED_WEIGHT, LM_HEAD_WEIGHT):
        yield name, (shapes.vocab_size, shapes.hidden_size)
    yield NORM, hidden
    for index in range(shapes.num_layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.{ATTENTION_NORM}", hidden
        yield f"{prefix}.{MLP_NORM}", hidden
        for target, module in MODULES.items():
            shape = shapes.target_shape(target)
            yield f"{_module(prefix, target)}.weight", shape
            if config.mlp_bias if module == "mlp" else config.attention_bias:
                yield f"{_module(prefix, target)}.bias", shape[:1]


def _module(prefix: str, target: str) -> str:
    return f"{prefix}.{MODULES[target]}.{target}"


def untie(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """The config that is true of the checkpoint: a stored lm_head that differs from the embedding
    is used, whatever tie_word_embeddings says, as transformers does."""
    tied = (
        config.shapes.tie_word_embeddings
        and {EMBED_WEIGHT, LM_HEAD_WEIGHT} <= checkpoint.tensors.keys()
    )
    if not tied or checkpoint.equal(EMBED_WEIGHT, LM_HEAD_WEIGHT):
        return config
    log.warning(
        "%s: config.json ties lm_head to the embedding, but the checkpoint's lm_head differs: the "
        "stored one is used; set tie_word_embeddings to false",
        checkpoint.folder,
    )
    return replace(config, shapes=replace(config.shapes, tie_word_embeddings=False))


def vocabulary_names(checkpoint: Checkpoint, shapes: ModelShapes) -> tuple[str, str]:
    """The tensors that are read for the embedding and for lm_head; tied, they are one."""
    if not shapes.tie_word_embeddings:
        return EMBED_WEIGHT, LM_HEAD_WEIGHT
    name = EMBED_WEIGHT if EMBED_WEIGHT in checkpoint.tensors else LM_HEAD_WEIGHT
    return name, name


def load_weights(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    packing: Packing[Dense],
) -> DecoderWeights[Dense]:
    """Read every tensor.

    Raises what `Checkpoint.read_into` raises, and InvalidArgumentError naming a tensor that is not
    finite and is to be quantised.
    """
    reader = _Reader(checkpoint, config, device, dtype, packing)
    shapes = config.shapes
    embedding, lm_head_name = vocabulary_names(checkpoint, shapes)
    embed_VH = reader.tensor(embedding, (shapes.vocab_size, shapes.hidden_size))
    layers = []
    for index in range(shapes.num_layers):
        layers.append(reader.layer(index))
        give_back()
    norm = reader.tensor(NORM, (shapes.hidden_size,))
    lm_head_VH = embed_VH
    if lm_head_name != embedding:
        lm_head_VH = reader.matrix([lm_head_name], [shapes.vocab_size], shapes.hidden_size)
    lm_head = _packed(packing.head, lm_head_VH, None, [lm_head_name], [shapes.vocab_size])
    return DecoderWeights(embed_VH, tuple(layers), norm, lm_head)


class _Reader(Generic[Dense]):
    """Reads tensors by name, into the memory and the layout that `packing` wants."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        packing: Packing[Dense],
    ) -> None:
        self.packing = packing
        self.checkpoint = checkpoint
        self.config = config
        self.device = device
        self.dtype = dtype
        self._shared = torch.empty(0, dtype=dtype, device=device)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._read([name], [shape[0]], self._empty(shape))

    def matrix(self, names: Sequence[str], rows: Sequence[int], inputs: int) -> Tensor:
        """The named weights below each other, to be packed before the next ones are read."""
        shape = (sum(rows), inputs)
        if not self.packing.copies:
            return self._read(names, rows, self._empty(shape))
        if len(self._shared) < prod(shape):
            del self._shared
            self._shared = self._empty((prod(shape),))
        return self._read(names, rows, self._shared[: prod(shape)].view(shape))

    def layer(self, index: int) -> LayerWeights[Dense]:
        hidden = (self.config.shapes.hidden_size,)
        prefix = f"model.layers.{index}"
        attention_bias, mlp_bias = self.config.attention_bias, self.config.mlp_bias
        dense = self.packing.dense
        return LayerWeights(
            index=index,
            attention_norm=self.tensor(f"{prefix}.{ATTENTION_NORM}", hidden),
            qkv=self._dense(dense, prefix, ("q_proj", "k_proj", "v_proj"), attention_bias),
            o=self._dense(dense, prefix, ("o_proj",), attention_bias),
            mlp_norm=self.tensor(f"{prefix}.{MLP_NORM}", hidden),
            gate_up=self._dense(self.packing.pair, prefix, ("gate_proj", "up_proj"), mlp_bias),
            down=self._dense(dense, prefix, ("down_proj",), mlp_bias),
        )

    def _dense(
        self, pack: Pack[Dense], prefix: str, targets: tuple[str, ...], has_bias: bool
    ) -> Dense:
        shapes = [self.config.shapes.target_shape(target) for target in targets]
        names = [_module(prefix, target) for target in targets]
        rows = [shape[0] for shape in shapes]
        weights = [f"{name}.weight" for name in names]
        weight, bias = self.matrix(weights, rows, shapes[0][1]), None
        if has_bias:
            bias = self._read([f"{name}.bias" for name in names], rows, self._empty((sum(rows),)))
        return _packed(pack, weight, bias, weights, rows)

    def _read(self, names: Sequence[str], rows: Sequence[int], out: Tensor) -> Tensor:
        """The named tensors below each other."""
        for name, part in zip(names, out.split_with_sizes(list(rows)), strict=True):
            self.checkpoint.read_into(name, part)
        return out

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def _packed(
    pack: Pack[Dense],
    weight: Tensor,
    bias: Tensor | None,
    names: Sequence[str],
    rows: Sequence[int],
) -> Dense:
    """names, rows: of the tensors that `weight` joins, for the error."""
    try:
        return pack(weight, bias)
    except NotFiniteError as error:
        place = bisect_right(list(accumulate(rows)), error.row)
        raise InvalidArgumentError(
            f"tensor {names[place]} holds NaN or infinity, which cannot be quantised: use a sound "
            "checkpoint, or leave --quantize out",
            reason=Reason.INVALID_MODEL,
        ) from error
