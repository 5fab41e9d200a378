"""One shard's part of a step: what `TorchBackend` does, with three places where shards meet.

With p_i shard i's part of a sum, and + from left to right:

- the embedding of a token is p_0 + p_1 + ...: one of them is its row, the others are zeros;
- hidden += p_0 + p_1 + ..., behind o and behind down. p_i is the product of the shard's inputs and
  its columns of the matrix, in shard 0 the bias, then the updates of the row's LoRAs in their
  order, each rounded to the model's dtype. The sum is rounded to it once, and then added;
- logits are put side by side.

So every shard has the same hidden states, and a token's bits depend on nothing of the other tokens
that they do not depend on in one process.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding

from lorastack.kernels.linear import Dense, linear, pack_dense
from lorastack.kernels.ops import Ops
from lorastack.lora.linear import add_group
from lorastack.lora.segments import LoraBatch
from lorastack.model.backends.parallel.checkpoint import CheckpointShard
from lorastack.model.backends.parallel.group import Group
from lorastack.model.backends.parallel.orders import Setup
from lorastack.model.backends.parallel.shards import shard_config
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.weights import DecoderWeights, Packing, load_weights


def load_shard(checkpoint: CheckpointShard, setup: Setup) -> DecoderWeights[Dense]:
    """A shard's weights. Raises what `load_weights` raises."""
    return load_weights(
        checkpoint,
        shard_config(setup.config, setup.shard),
        device=setup.device,
        dtype=setup.dtype,
        packing=Packing(pack_dense, pair=pack_dense, head=pack_dense, copies=False),
    )


class ShardedBackend(TorchBackend):
    """See the module. `shapes` are the shard's; every shard runs the same calls in turn."""

    def __init__(
        self, setup: Setup, weights: DecoderWeights[Dense], ops: Ops, group: Group
    ) -> None:
        """weights: what `load_shard` gave."""
        config = shard_config(setup.config, setup.shard)
        super().__init__(config, weights, setup.device, setup.dtype, ops)
        self._group = group
        self._vocab_size = setup.config.shapes.vocab_size
        self._first_token = setup.shard.part(self._vocab_size).start

    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """See `Backend`. Of all tokens on shard 0; elsewhere they are the shard's own."""
        part_XV = super().logits(hidden_XH, lora)
        return self._group.columns(part_XV, self._vocab_size) if len(part_XV) else part_XV

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        table_VH = self._weights.embed_VH
        places_T = token_ids_T - self._first_token
        mine_T = (places_T >= 0) & (places_T < len(table_VH))
        part_TH = embedding(places_T.where(mine_T, 0), table_VH)
        return self._group.sum(part_TH.where(mine_T[:, None], 0))

    def _add_dense(
        self,
        hidden_TH: Tensor,
        x_TI: Tensor,
        weight: Dense,
        lora: LoraBatch,
        layer: int,
        group: int,
    ) -> None:
        part_TH = linear(x_TI, weight)
        add_group(x_TI, (part_TH,), lora, layer, group)
        hidden_TH += self._group.sum(part_TH)
