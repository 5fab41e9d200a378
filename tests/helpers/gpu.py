"""A CUDA device that is made up, as far as a start asks of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def give_gpu(patch: pytest.MonkeyPatch, free: int, total: int) -> None:
    """A machine with a CUDA device of so many bytes."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    made = SimpleNamespace(total_memory=total)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: made)
