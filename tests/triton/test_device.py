"""The calls of a CUDA device, on events that are made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorastack.model.backends.triton import device as module
from lorastack.model.backends.triton.device import CudaDevice

DAY = 24 * 3600 * 1000.0  # milliseconds


class Clock:
    """A device's, in milliseconds. As CUDA does, it gives what lies between as a float32."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self, **settings: object) -> Any:
        clock = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, other: Event) -> float:
                return float(np.float32(other.at - self.at))

        return Event()


def test_times_are_exact_after_days(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "_event", clock.event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    device = CudaDevice(torch.device("cuda"))
    clock.now = 3 * DAY
    began = device.mark()
    clock.now += 0.25
    assert device.seconds(began, device.mark()) == pytest.approx(0.25e-3, rel=1e-5)
