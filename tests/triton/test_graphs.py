"""When steps are captured, and what runs then."""

from __future__ import annotations

import pytest

from lorastack.model.backends.triton.device import CpuDevice
from lorastack.model.backends.triton.graphs import MAX_GRAPHS, Graphs
from tests.helpers.fake_device import LateDevice


class Steps:
    """Steps of several keys, and what the device did of them."""

    def __init__(self, device: LateDevice | CpuDevice) -> None:
        self.done: list[str] = []
        self.graphs = Graphs(device)
        self._device = device

    def launch(self, key: str) -> None:
        if isinstance(self._device, LateDevice):
            self._device.enqueue(lambda: self.done.append(key))
        else:
            self.done.append(key)

    def run(self, key: str) -> None:
        self.graphs.run(key, lambda: self.launch(key))


def test_a_key_is_captured_at_its_third_use_and_once() -> None:
    device = LateDevice()
    steps = Steps(device)
    for key in "aabaabab":
        steps.run(key)
    device.run()
    assert steps.done == list("aabaabab")
    assert device.log == ["capture", "replay", "replay", "replay", "capture", "replay"]
    assert len(steps.graphs) == 2


def test_a_capture_runs_nothing_and_replays_keep_their_place() -> None:
    device = LateDevice()
    steps = Steps(device)
    steps.run("a")
    steps.graphs.capture("a", lambda: steps.launch("a"))
    steps.graphs.capture("a", lambda: steps.launch("a"))
    steps.run("b")
    steps.run("a")
    device.run()
    assert steps.done == ["a", "b", "a"]
    assert device.log == ["capture", "replay"]


def test_a_capture_that_fails_is_told_once_and_steps_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = LateDevice()
    device.failing = {"capture"}
    steps = Steps(device)
    for key in "aaaaa":
        steps.run(key)
    device.run()
    assert steps.done == list("aaaaa") and device.log == ["capture"]
    (record,) = caplog.records
    assert "steps a run without a graph" in record.message and record.exc_info


def test_graphs_are_no_more_than_their_memory_is_counted_for() -> None:
    device = LateDevice()
    steps = Steps(device)
    keys = [str(key) for key in range(MAX_GRAPHS + 2)]
    for key in keys * 4:
        steps.run(key)
    device.run()
    assert steps.done == keys * 4
    assert len(steps.graphs) == device.log.count("capture") == MAX_GRAPHS


def test_without_graphs_every_step_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(CpuDevice())
    for key in "aaaa":
        steps.run(key)
    assert steps.done == list("aaaa") and len(steps.graphs) == 0 and not caplog.records
