"""A step's integers, brought to its device at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


def upload(parts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Each part as int64 on the device: views of one tensor, which goes there in one copy.

    On CUDA from page-locked memory, so that the host goes on while the copy runs.
    """
    whole = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
    if device.type == "cuda":
        whole = whole.pin_memory()
    sizes = [len(part) for part in parts]
    return list(whole.to(device, non_blocking=True).split_with_sizes(sizes))
