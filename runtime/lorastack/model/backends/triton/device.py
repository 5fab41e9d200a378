"""The few calls of a device that are not kernels: copies, what waits for them, and graphs.

Everything of a step is enqueued in order on the stream of the thread that runs steps, its results'
copy to the host as well; the host waits once a step, for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Replay = Callable[[], None]  # enqueues what was captured
Mark = Any  # a place of a stream, as its device has it


class Device(Protocol):
    """captures: launches can be captured in a graph."""

    captures: bool

    def host_buffer(self, nbytes: int) -> Tensor:
        """uint8 in main memory, zeros; copies from and to it do not keep the host."""
        ...

    def upload(self, host: Tensor, device: Tensor) -> None:
        """Enqueues a copy. `host` must not change until `free_to_write` has returned."""
        ...

    def free_to_write(self) -> None:
        """Returns when no upload reads host memory any more."""
        ...

    def download(self, device: Tensor, host: Tensor) -> None:
        """Enqueues a copy. `host` has it when `wait` has returned."""
        ...

    def wait(self) -> None:
        """Returns when all downloads are there, and all that was enqueued before them is done."""
        ...

    def mark(self) -> Mark:
        """Marks this place of the stream."""
        ...

    def seconds(self, began: Mark, ended: Mark) -> float:
        """Between the device's coming by one mark and by a later one, once a download behind both
        is there."""
        ...

    def capture(self, run: Callable[[], None]) -> Replay:
        """What `run` enqueues, which runs at each replay and not now. It must have run before."""
        ...


class CpuDevice:
    """Triton's interpreter: everything has happened when a call returns."""

    captures = False

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, host: Tensor, device: Tensor) -> None:
        device.copy_(host)

    def free_to_write(self) -> None:
        pass

    def download(self, device: Tensor, host: Tensor) -> None:
        host.copy_(device)

    def wait(self) -> None:
        pass

    def mark(self) -> float:
        return time.monotonic()

    def seconds(self, began: float, ended: float) -> float:
        return ended - began

    def capture(self, run: Callable[[], None]) -> Replay:
        raise NotImplementedError("the interpreter has no graphs")


class CudaDevice:
    """A CUDA device. All graphs share one pool of memory, as one replay follows another."""

    captures = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploaded, self._done = _event(), _event()
        # The default stream cannot be captured.
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, host: Tensor, device: Tensor) -> None:
        device.copy_(host, non_blocking=True)
        self._uploaded.record()

    def free_to_write(self) -> None:
        self._uploaded.synchronize()

    def download(self, device: Tensor, host: Tensor) -> None:
        host.copy_(device, non_blocking=True)
        self._done.record()

    def wait(self) -> None:
        self._done.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = _event(timing=True)
        event.record()
        return event

    def seconds(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        # A float32 of milliseconds: exact between marks of a step, not since the process began.
        milliseconds: float = began.elapsed_time(ended)
        return milliseconds / 1000

    def capture(self, run: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            # Other threads may allocate and copy meanwhile: their calls are no part of the graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        self._pool = graph.pool()
        return graph.replay


def _event(timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]


def device_of(device: torch.device) -> Device:
    """The calls of a torch device."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
