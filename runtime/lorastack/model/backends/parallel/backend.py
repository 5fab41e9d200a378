"""The backend of a model on several devices: shard 0, in the server's process, leads the others.

Whatever the engine asks is told to all shards first (`orders`), which then do the same. What is
drawn, accepted and proposed is shard 0's alone, which has the logits of all tokens and the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import count

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from lorastack.kernels.ops import Ops
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.parallel.checkpoint import CheckpointShard
from lorastack.model.backends.parallel.crew import TIMEOUT, Crew
from lorastack.model.backends.parallel.group import Group
from lorastack.model.backends.parallel.loras import Lender
from lorastack.model.backends.parallel.orders import Join, Logits, MakeKV, MoveKV, Run, Setup
from lorastack.model.backends.parallel.sharded import ShardedBackend, load_shard
from lorastack.model.backends.parallel.shards import Shard
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache, Move
from lorastack.model.weights import vocabulary_names


class ParallelKV(KVCache):
    """Shard 0's keys and values, and the number by which the others know theirs."""

    def __init__(
        self,
        shapes: ModelShapes,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        number: int,
        crew: Crew,
    ) -> None:
        """shapes: of shard 0."""
        super().__init__(shapes, num_pages, page_size, dtype, device)
        self.number = number
        self._crew = crew

    def move(self, moves: Sequence[Move]) -> None:
        """See `KVCache`. On all shards."""
        if moves:
            with self._crew.together():
                self._crew.send(MoveKV(self.number, moves))
                super().move(moves)


class ParallelBackend:
    """See `Backend`. After a `DeviceLostError` no call works any more.

    loras: hands LoRAs over to the other shards, which no step may use before.
    """

    overlaps = False

    def __init__(
        self,
        own: ShardedBackend,
        group: Group,
        crew: Crew,
        shapes: ModelShapes,
        part: CheckpointShard,
    ) -> None:
        """own, part: of shard 0; shapes: the whole model's."""
        self.name = f"{own.name} x{group.shard.count}"
        self.shapes = shapes
        self.device = own.device
        self.dtype = own.dtype
        self.quantization = own.quantization
        self.dynamic_rope_begin = own.dynamic_rope_begin
        self.ops = own.ops
        self.crew = crew
        self._own = own
        self._group = group
        self.loras = Lender(group.shard, crew)
        self._num_kv = count()
        self._part = part
        _, self._lm_head = vocabulary_names(part, shapes)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        num_shards: int,
    ) -> ParallelBackend:
        """Starts the other shards' processes, and reads shard 0's weights beside them.

        On CUDA shard i takes device i. Raises what `load_weights` raises, and DeviceLostError for a
        process that does not come up.
        """
        setup, *others = [
            Setup(
                shard=shard,
                folder=checkpoint.folder,
                config=config,
                device=_device(device, shard),
                dtype=dtype,
                threads=torch.get_num_threads(),
                timeout=TIMEOUT,
            )
            for shard in Shard(0, num_shards).all
        ]
        crew = Crew(others)
        try:
            part = CheckpointShard(checkpoint, setup.shard)
            weights = load_shard(part, setup)
            crew.wait_ready()
            with crew.together():
                crew.send(Join())
                group = join(setup, crew.store)
        except BaseException:
            crew.close()
            raise
        crew.abort_with(group.abort)
        return cls(ShardedBackend(setup, weights, ops, group), group, crew, config.shapes, part)

    def make_kv(self, num_pages: int, page_size: int) -> ParallelKV:
        """See `Backend`. On every shard, for its own heads."""
        with self.crew.together():
            self.crew.send(MakeKV(num_pages, page_size))
            return ParallelKV(
                self._own.shapes,
                num_pages,
                page_size,
                self.dtype,
                self.device,
                number=next(self._num_kv),
                crew=self.crew,
            )

    def prepare(self, kv: KVCache) -> None:
        """See `Backend`."""

    def forward(
        self, batch: ForwardBatch, kv: KVCache, meanwhile: Callable[[], None] | None = None
    ) -> Outputs:
        """See `Backend`. kv: what `make_kv` made."""
        assert isinstance(kv, ParallelKV)
        with self.crew.together():
            lora, uses = self.loras.lend(batch.lora)
            self.crew.send(Run(kv.number, replace(batch, lora=LoraBatch(), trees=()), uses))
            hidden_XH, logits_XV = self._own.compute(replace(batch, lora=lora), kv)
        return self._own.outputs(hidden_XH, logits_XV, batch.trees)

    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """See `Backend`."""
        with self.crew.together():
            lora, uses = self.loras.lend(lora)
            self.crew.send(Logits(len(hidden_XH), uses))
            hidden_XH = hidden_XH.contiguous()
            self._group.broadcast(hidden_XH)
            return self._own.logits(hidden_XH, lora)

    def head_rows(self, ids: Sequence[int], out_NH: Tensor) -> None:
        """See `Backend`. From the checkpoint: shard 0 has its own part of them alone."""
        self._part.read_rows(self._lm_head, ids, out_NH)

    def adopt(self, lora: LoraWeights) -> None:
        """See `Backend`. The first step does it: only between steps may the others get orders."""


def _device(device: torch.device, shard: Shard) -> torch.device:
    return device if device.type == "cpu" else torch.device(device.type, shard.index)


def join(setup: Setup, file: int) -> Group:
    """Waits for the other shards. file: open in all of them, see `Crew`."""
    store = FileStore(f"/proc/self/fd/{file}", setup.shard.count)
    store.set_timeout(timedelta(seconds=setup.timeout))
    return Group(setup.shard, setup.device, store, setup.timeout)
