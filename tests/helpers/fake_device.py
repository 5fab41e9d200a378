"""A device whose stream runs late: nothing enqueued has happened until somebody waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorastack.kernels.triton.launch import Kernel


class LateDevice:
    """In place of a CUDA device, on CPU memory. log: what was called, in order.

    While it is `patched_in`, launches wait in its queue as well; graphs keep theirs.
    """

    captures = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failing: set[str] = set()  # calls that raise
        self.num_launches = 0
        self._queue: list[Callable[[], object]] = []
        self._captured: list[Callable[[], object]] | None = None
        self._now = 0

    def launch(
        self, kernel: Kernel, grid: Sequence[int], *args: object, **settings: object
    ) -> None:
        """In place of `launch.launch`."""
        self.num_launches += 1
        self.enqueue(lambda: kernel[tuple(grid)](*args, **settings))

    def enqueue(self, work: Callable[[], object]) -> None:
        (self._queue if self._captured is None else self._captured).append(work)

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, host: Tensor, device: Tensor) -> None:
        assert self._captured is None, "a copy inside a graph"
        self._note("upload")
        self.enqueue(lambda: device.copy_(host))

    def free_to_write(self) -> None:
        self.run()

    def download(self, device: Tensor, host: Tensor) -> None:
        assert self._captured is None, "the host waits inside a graph"
        self._note("download")
        self.enqueue(lambda: host.copy_(device))

    def wait(self) -> None:
        self._note("wait")
        self.run()

    def mark(self) -> list[float]:
        times: list[float] = []

        def come_by() -> None:
            self._now += 1
            times.append(float(self._now))

        self.enqueue(come_by)
        return times

    def seconds(self, began: list[float], ended: list[float]) -> float:
        return ended[0] - began[0]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self._captured = []
        try:
            self._note("capture")
            run()
            captured = self._captured
        finally:
            self._captured = None

        def replay() -> None:
            self._note("replay")
            self._queue.extend(captured)

        return replay

    def run(self) -> None:
        """All that is enqueued."""
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def _note(self, call: str) -> None:
        self.log.append(call)
        if call in self.failing:
            raise RuntimeError(f"{call} failed")
