"""What a step leaves for the host, in one copy back."""

from __future__ import annotations

import torch
from torch import Tensor

from lorastack.kernels.triton.samples import Sampled
from lorastack.model.backends.triton.device import Device
from lorastack.model.backends.triton.packed import Packed
from lorastack.model.context import ForwardBatch
from lorastack.speculation.accept import Accepted, Nodes, accept

DRAFT_ROOM = 1 << 16  # ids and log-probabilities of what heads propose


class StepResults:
    """Of a bucket. sampled: where the kernels write; drafts: room for what heads propose, int32."""

    def __init__(self, bucket: int, device: torch.device, calls: Device) -> None:
        fields = {
            "peaks_X": (torch.float32, (bucket,)),
            "best_X": (torch.int32, (bucket,)),
            "tokens_X": (torch.int32, (bucket,)),
            "drafts": (torch.int32, (DRAFT_ROOM,)),
        }
        self._packed = Packed(fields, device, calls)
        on_device = self._packed.device
        self.sampled = Sampled(on_device["peaks_X"], on_device["best_X"], on_device["tokens_X"])
        self.drafts: Tensor = on_device["drafts"]

    def download(self, num_drafts: int) -> None:
        """Enqueues the copy to the host. num_drafts: elements of `drafts` that count."""
        self._packed.download(num_drafts)

    def best(self, num_outputs: int) -> tuple[Tensor, Tensor]:
        """peaks_X, float32, and best_X, int64, on the host."""
        host = self._packed.host
        peaks_X = torch.from_numpy(host["peaks_X"][:num_outputs].copy())
        return peaks_X, torch.from_numpy(host["best_X"][:num_outputs].astype("int64"))

    def accepted(self, batch: ForwardBatch) -> list[Accepted]:
        """What each tree gains: all its nodes are sampled."""
        trees, tokens = batch.trees, self._packed.host["tokens_X"]

        def sample(nodes: Nodes) -> list[int]:
            places = [trees[index].first_output + node for index, node, _ in nodes]
            sampled: list[int] = tokens[places].tolist()
            return sampled

        return accept([each.tree for each in trees], sample)

    def drafted(self, num_drafts: int) -> Tensor:
        """What counts of `drafts`, int32 on the host."""
        return torch.from_numpy(self._packed.host["drafts"][:num_drafts].copy())
