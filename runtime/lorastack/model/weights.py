"""The decoder's weights, read from a checkpoint straight into the layout the step loop wants.

q, k and v are one matrix, gate and up another: a layer is four dense calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig

MODULES = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip


Dense = TypeVar("Dense")  # a backend's own kind of packed weight
Pack = Callable[[Tensor, Tensor | None], Dense]  # weight [out, in], bias [out]


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


def load_weights(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    pack: Pack[Dense],
    pack_pair: Pack[Dense],
) -> DecoderWeights[Dense]:
    """Read every tensor. pack: lays a weight out for its backend; pack_pair: gate and up.

    Raises InvalidArgumentError naming a tensor that is missing, misshapen or not known to this
    decoder.
    """
    reader = _Reader(checkpoint, config, device, dtype, pack, pack_pair)
    shapes = config.shapes
    embed_VH = reader.tensor("model.embed_tokens.weight", (shapes.vocab_size, shapes.hidden_size))
    layers = tuple(reader.layer(index) for index in range(shapes.num_layers))
    norm = reader.tensor("model.norm.weight", (shapes.hidden_size,))
    if shapes.tie_word_embeddings:
        reader.used.add("lm_head.weight")  # some checkpoints store the tied copy
        lm_head = pack(embed_VH, None)
    else:
        lm_head_VH = reader.tensor("lm_head.weight", (shapes.vocab_size, shapes.hidden_size))
        lm_head = pack(lm_head_VH, None)
    reader.refuse_unknown()
    return DecoderWeights(embed_VH, layers, norm, lm_head)


class _Reader(Generic[Dense]):
    """Reads tensors by name and remembers which."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        pack: Pack[Dense],
        pack_pair: Pack[Dense],
    ) -> None:
        self.pack = pack
        self.pack_pair = pack_pair
        self.checkpoint = checkpoint
        self.config = config
        self.device = device
        self.dtype = dtype
        self.used: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._joined([name], [shape[0]], shape[1:])

    def layer(self, index: int) -> LayerWeights[Dense]:
        hidden = (self.config.shapes.hidden_size,)
        prefix = f"model.layers.{index}"
        attention_bias, mlp_bias = self.config.attention_bias, self.config.mlp_bias
        return LayerWeights(
            index=index,
            attention_norm=self.tensor(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self.pack(*self._dense(prefix, ("q_proj", "k_proj", "v_proj"), attention_bias)),
            o=self.pack(*self._dense(prefix, ("o_proj",), attention_bias)),
            mlp_norm=self.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self.pack_pair(*self._dense(prefix, ("gate_proj", "up_proj"), mlp_bias)),
            down=self.pack(*self._dense(prefix, ("down_proj",), mlp_bias)),
        )

    def refuse_unknown(self) -> None:
        """A tensor nobody read would change the output in a way this decoder does not know."""
        for name in sorted(self.checkpoint.tensors):
            if name not in self.used and not name.endswith("rotary_emb.inv_freq"):
                raise InvalidArgumentError(
                    f"tensor {name} is not known to {self.config.shapes.architecture} "
                    "with this config.json: use the model's original checkpoint",
                    reason=Reason.UNSUPPORTED_MODEL,
                )

    def _dense(
        self, prefix: str, targets: tuple[str, ...], has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        shapes = [self.config.shapes.target_shape(target) for target in targets]
        names = [f"{prefix}.{MODULES[target]}.{target}" for target in targets]
        rows = [shape[0] for shape in shapes]
        weight = self._joined([f"{name}.weight" for name in names], rows, shapes[0][1:])
        bias = self._joined([f"{name}.bias" for name in names], rows, ()) if has_bias else None
        return weight, bias

    def _joined(self, names: Sequence[str], rows: Sequence[int], rest: tuple[int, ...]) -> Tensor:
        """The named tensors below each other."""
        joined = torch.empty((sum(rows), *rest), dtype=self.dtype, device=self.device)
        for name, part in zip(names, joined.split_with_sizes(list(rows)), strict=True):
            self.checkpoint.read_into(name, part)
            self.used.add(name)
        return joined
