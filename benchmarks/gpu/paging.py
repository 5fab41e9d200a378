"""Adapters that come while rows decode: how fast, whole, and at what cost to the rows.

A step of eight rows of Mistral-7B's shapes, quiet, and while adapters are copied without a pause.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.clock import host_seconds
from benchmarks.gpu.decoding import decoding
from benchmarks.gpu.models import random_lora
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import DTYPE, Model
from lorastack.adapters.memory.arena import DeviceArena, PinnedArena
from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.device import DeviceAdapter, MakeViews, no_views
from lorastack.adapters.memory.host import PackedAdapter
from lorastack.config import GIB
from lorastack.engine.views import make_views

KINDS = 4  # adapters that take turns
UNDER_WAY = 3
STEPS, COPIES = 400, 20
TINY_STEPS = 4
LEAST = 0.1  # adapters that come beside a step, for the steps to be beside copies
MOST = 1.1  # times the quiet p99


def cases(setting: Setting) -> Cases:
    return {"copies": partial(_copies, setting), "steps": partial(_steps, setting)}


class Traffic:
    """Cold adapters without end: each is dropped when it has come. done: how many; wrong: of them,
    those whose bytes are not the host's."""

    def __init__(self, setting: Setting, views: MakeViews = no_views) -> None:
        streams = setting.streams
        self.done, self.wrong = 0, 0
        self._host = PinnedArena(GIB, lambda: False, make=None if setting.on_device else _plain)
        self._packed = [self._pack(setting, f"{kind}") for kind in range(KINDS)]
        self.nbytes = self._packed[0].nbytes
        arena = DeviceArena(2 * UNDER_WAY * self.nbytes, setting.device, streams)
        self._copies = Copies(arena, streams, _no_rows, lambda: None, views)
        self._started, self._under_way = 0, set[str]()

    def _pack(self, setting: Setting, digest: str) -> PackedAdapter:
        adapter = random_lora(setting.mistral, DTYPE, setting.device)
        host = self._host.empty(len(adapter.buffer), DTYPE)
        host.copy_(adapter.buffer)
        return PackedAdapter(digest=digest, buffer=host, layout=adapter.layout, pinned=True)

    def advance(self) -> list[DeviceAdapter]:
        """Takes what has come and starts others, as the engine does between steps. Returns what has
        come, to be dropped."""
        come = []
        for adapter in self._copies.finished():
            assert isinstance(adapter, DeviceAdapter), adapter
            come.append(adapter)
            self.done += 1
            self._under_way.remove(adapter.digest)
        while len(self._under_way) < UNDER_WAY:
            digest = f"{self._started}"
            self._copies.start(replace(self._packed[self._started % KINDS], digest=digest))
            self._under_way.add(digest)
            self._started += 1
        self._copies.advance(self._under_way, lambda: ())
        return come

    def drop(self, adapters: list[DeviceAdapter], *, check: bool = False) -> None:
        """Gives their places back. check: compares their bytes first, which waits."""
        for adapter in adapters:
            if check:
                host = self._packed[int(adapter.digest) % KINDS].buffer
                self.wrong += not torch.equal(adapter.buffer.cpu(), host)
            self._copies.release(adapter.digest)


def _plain(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def _no_rows(ids: object, out: object) -> None:
    raise AssertionError("LoRAs have no rows of lm_head")


def _copies(setting: Setting) -> Iterator[Finding]:
    traffic = Traffic(setting)
    while traffic.done < KINDS:
        traffic.drop(traffic.advance(), check=True)
    yield Finding(f"adapters of {traffic.done} with other bytes", traffic.wrong, most=0)
    began, before = time.perf_counter(), traffic.done
    while traffic.done < before + COPIES:
        traffic.drop(traffic.advance())
    seconds = time.perf_counter() - began
    rate = (traffic.done - before) * traffic.nbytes / seconds
    yield Finding(f"adapters of {traffic.nbytes / 1e6:.0f} MB", rate / 1e9, "GB/s")


def _steps(setting: Setting) -> Iterator[Finding]:
    model = Model(setting)
    traffic = Traffic(setting, partial(make_views, model.backend))
    batch = decoding(model.shapes, 2 if setting.tiny else 8, model.past)

    def step() -> None:
        model.backend.forward(batch, model.kv)

    def busy() -> None:
        traffic.drop(traffic.advance())
        step()

    steps = TINY_STEPS if setting.tiny else STEPS
    p99 = int(0.99 * steps)  # of as many times that rise
    host_seconds(step, 1 if setting.tiny else 10)
    quiet = host_seconds(step, steps)
    beside = host_seconds(busy, steps)
    least = setting.goal(LEAST * steps)
    yield Finding(f"adapters that came beside {steps} steps", traffic.done, least=least)
    for name, times in (("quiet", quiet), ("beside copies", beside)):
        yield Finding(f"{name}, median", 1000 * times[steps // 2], "ms a step")
        yield Finding(f"{name}, p99", 1000 * times[p99], "ms a step")
    most, ratio = setting.goal(MOST), beside[p99] / quiet[p99]
    yield Finding("p99 beside copies", ratio, "times the quiet one", most=most)
    last = traffic.done + KINDS
    while traffic.done < last:
        traffic.drop(traffic.advance(), check=True)
    yield Finding("adapters with other bytes", traffic.wrong, most=0)
