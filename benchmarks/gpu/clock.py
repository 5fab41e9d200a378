"""Times on a device. In the interpreter they say nothing, and everything is called but once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch

from benchmarks.gpu.setting import Setting
from lorastack.kernels.triton.launch import INTERPRETED

REPEATS = 10
SPREAD_BYTES = 512 << 20  # of what calls read in turn: far more than a cache holds
LEAST_CALLS = 16  # in a graph
COPIED_BYTES = 4 << 30


def bandwidth(setting: Setting) -> float:
    """Bytes a second that a large copy reads and writes."""
    nbytes = 1 << 16 if setting.tiny else COPIED_BYTES
    source = torch.ones(nbytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_of([lambda: target.copy_(source)], 3)


def num_copies(setting: Setting, nbytes: int) -> int:
    """Of what a call reads, so that calls that take turns read none from a cache."""
    return 2 if setting.tiny else max(2, -(-SPREAD_BYTES // nbytes))


def seconds_of(calls: Sequence[Callable[[], object]], least_calls: int = LEAST_CALLS) -> float:
    """The median of what one of the calls takes, as they follow each other in a CUDA graph."""
    if INTERPRETED:
        return statistics.median(host_seconds(call, 1)[0] for call in calls)
    for call in calls:
        call()
    torch.cuda.synchronize()
    count = max(len(calls), least_calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), count):
            call()
    times = []
    for _ in range(REPEATS + 1):  # the first is not counted
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000 / count)
    return statistics.median(times[1:])


def host_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """What calls take on the host that wait for the device themselves, rising."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)
