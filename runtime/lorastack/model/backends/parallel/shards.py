"""Which part of a model lies on which device.

A model is cut into `count` shards, one a device and process. Shard i has, of each layer, the i-th
part of the heads (query and key-value) and of the intermediate size, and of the embedding and
lm_head the i-th part of the vocabulary:

- by outputs: q, k, v, gate, up, lm_head, and embed_tokens by its tokens. Every shard has the whole
  input and makes its own outputs; of a LoRA it takes all of A and its rows of B;
- by inputs: o and down. Every shard has the inputs that its own heads or its part of the
  intermediate size made, and adds up its part of every sum; of a LoRA it takes its columns of A and
  all of B. A bias is added by shard 0 alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.kernels.quantize import Kind
from lorastack.kernels.segmented_lora import GroupLora
from lorastack.layout import GROUPS, ModelShapes
from lorastack.lora.weights import LM_HEAD_GROUP, LoraWeights
from lorastack.model.config import DecoderConfig

BY_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """The index-th of `count` shards, from 0."""

    index: int
    count: int

    def part(self, size: int) -> slice:
        """This shard's part of `size` things in a row; parts differ in length by one at most."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def length(self, size: int) -> int:
        """How long that part is."""
        return len(range(size)[self.part(size)])

    @property
    def all(self) -> list[Shard]:
        """All shards of the model, in order."""
        return [Shard(index, self.count) for index in range(self.count)]


def check_shards(shapes: ModelShapes, count: int, kind: Kind | None) -> None:
    """Raises InvalidArgumentError for a model that cannot be cut into `count` shards.

    kind: what its weights are quantised to.
    """
    option = f"--tensor-parallel {count}"
    if kind is not None:
        raise _refusal(f"{option} does not go with --quantize: leave one of them out")
    for name, size in (
        ("num_key_value_heads", shapes.num_kv_heads),
        ("intermediate_size", shapes.intermediate_size),
    ):
        if size % count:
            raise _refusal(
                f"{option} does not divide the model's {name}, {size}: give a number that does"
            )


def _refusal(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=Reason.INVALID_MODEL)


def shard_config(config: DecoderConfig, shard: Shard) -> DecoderConfig:
    """A config whose matrices are the shard's parts. See `check_shards`."""
    shapes, count = config.shapes, shard.count
    return replace(
        config,
        shapes=replace(
            shapes,
            num_heads=shapes.num_heads // count,
            num_kv_heads=shapes.num_kv_heads // count,
            intermediate_size=shapes.intermediate_size // count,
            vocab_size=shard.length(shapes.vocab_size),
        ),
    )


def shard_lora(weights: LoraWeights, shard: Shard) -> LoraWeights:
    """Views of what the shard applies of a LoRA; of embed_tokens' it is all."""
    groups = {key: _shard_group(group, key, shard) for key, group in weights.groups.items()}
    return replace(weights, groups=groups)


def _shard_group(group: GroupLora, key: tuple[int, int], shard: Shard) -> GroupLora:
    if key != LM_HEAD_GROUP and GROUPS[key[1]][0] in BY_INPUTS:
        return replace(group, a_RI=group.a_RI[:, shard.part(group.a_RI.shape[1])])
    targets = tuple(
        replace(target, b_OR=target.b_OR[shard.part(len(target.b_OR))]) for target in group.targets
    )
    return replace(group, targets=targets)
