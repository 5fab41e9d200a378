"""What the shards of a model say to each other: every one makes the same calls in the same order.

The order of every sum is fixed. `sum` brings all parts to all shards, and each adds them up as

    ((part 0 + part 1) + part 2) + ...

in float32 (float64 of a float64 model), rounded once at the end. An all-reduce would send less, but
adds in an order that depends on where in the tensor a value lies, so on the tokens beside it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import BroadcastOptions, GatherOptions, Store

from lorastack.model.backends.parallel.shards import Shard


class Group:
    """Collectives of one shard: gloo on the CPU, NCCL on CUDA devices.

    They raise RuntimeError when another shard is gone, or keeps them waiting for too long.
    """

    def __init__(self, shard: Shard, device: torch.device, store: Store, timeout: float) -> None:
        """Waits until all shards are there. store: one that all of them share; timeout: seconds."""
        self.shard = shard
        make = _nccl if device.type == "cuda" else _gloo
        self._backend: Any = make(shard, store, timedelta(seconds=timeout))
        self.sum(torch.zeros(1, device=device))  # the store has served: all have found each other

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all shards' parts, in their order, on every shard. [T, ...]"""
        parts = part.new_empty(self.shard.count * len(part), *part.shape[1:])
        self._backend._allgather_base(parts, part.contiguous()).wait()
        total, *others = parts.to(torch.promote_types(part.dtype, torch.float32)).chunk(
            self.shard.count
        )
        for other in others:
            total = total + other
        return total.to(part.dtype)

    def columns(self, part_XN: Tensor, total: int) -> Tensor:
        """[X, total] on shard 0: all shards' columns beside each other. Elsewhere the part itself.

        The part has the shard's part of `total` columns (`Shard.part`).
        """
        shards = self.shard.all
        widths = [shard.length(total) for shard in shards]
        sent_XN = part_XN.new_zeros(len(part_XN), max(widths))
        sent_XN[:, : part_XN.shape[1]] = part_XN
        options = GatherOptions()
        options.rootRank = 0
        got = [torch.empty_like(sent_XN) for _ in shards] if self.shard.index == 0 else []
        self._backend.gather([got] if got else [], [sent_XN], options).wait()
        if not got:
            return part_XN
        return torch.cat([each[:, :width] for each, width in zip(got, widths, strict=True)], dim=1)

    def broadcast(self, tensor: Tensor) -> None:
        """Fills a contiguous tensor of the same shape with that of shard 0."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._backend.broadcast([tensor], options).wait()

    def abort(self) -> None:
        """Ends what still waits for a shard that is gone. Any thread."""
        self._backend.abort()


# Groups are made without torch's global one, so that a process may have several; the types of their
# methods are missing in torch.
def _gloo(shard: Shard, store: Store, timeout: timedelta) -> Any:
    """Over the machine's own network, which nobody else hears."""
    options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined, unused-ignore]
    options._timeout = timeout
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return distributed.ProcessGroupGloo(store, shard.index, shard.count, options)


def _nccl(shard: Shard, store: Store, timeout: timedelta) -> Any:
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return distributed.ProcessGroupNCCL(store, shard.index, shard.count, options)
