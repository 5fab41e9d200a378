"""The processes of a model's other shards: how they start and end, and who hears of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from lorastack.errors import DeviceLostError, breaks_device
from lorastack.model.backends.parallel import crew as crew_module
from lorastack.model.backends.parallel.crew import Crew
from lorastack.model.backends.parallel.orders import Drop, Setup
from lorastack.model.backends.parallel.shards import Shard
from lorastack.model.config import load_config
from tests.helpers.live import wait_until

Start = Callable[..., Crew]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Iterator[Start]:
    """start(what the processes do, how many): not yet waited for."""
    crews: list[Crew] = []

    def build(behaviour: str, count: int = 1) -> Crew:
        monkeypatch.setattr(crew_module, "_MODULE", "tests.helpers.shard_script")
        monkeypatch.setenv("SHARD", behaviour)
        setups = [
            Setup(
                shard=shard,
                folder=tiny_llama,
                config=load_config(tiny_llama, None),
                device=torch.device("cpu"),
                dtype=torch.float32,
                store="",
                threads=1,
                timeout=1.0,
            )
            for shard in Shard(0, count + 1).all[1:]
        ]
        crews.append(Crew(setups))
        return crews[-1]

    yield build
    for crew in crews:
        crew.close()
        assert all(gone(pid) for pid in crew.pids)


def test_processes_end_when_they_are_told(start: Start) -> None:
    crew = start("ends when told", 2)
    crew.wait_ready()
    failures: list[BaseException] = []
    crew.watch(failures.append)
    with crew.together():
        pass
    crew.close()
    crew.close()
    assert all(gone(pid) for pid in crew.pids)
    assert failures == []


def test_a_process_that_does_not_end_is_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "GRACE", 0.1)
    crew = start("never ends")
    crew.wait_ready()
    crew.close()
    assert gone(crew.pids[0])


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("ends before it is ready", r"shard 1 of 2 \(process \d+\) ended with 3"),
        ("cannot start", r"shard 1 of 2 \(process \d+\) failed: MemoryError: too little"),
    ],
)
def test_a_process_that_cannot_start_says_why(start: Start, behaviour: str, words: str) -> None:
    with pytest.raises(DeviceLostError, match=words):
        start(behaviour).wait_ready()


def test_a_process_that_is_killed_is_noticed_at_once(start: Start) -> None:
    """Also while nobody asks anything of it; then every call says so, and all others are ended."""
    crew = start("never ends", 2)
    crew.wait_ready()
    failures: list[BaseException] = []
    aborted: list[bool] = []
    crew.abort_with(lambda: aborted.append(True))
    crew.watch(failures.append)
    os.kill(crew.pids[1], signal.SIGKILL)
    wait_until(lambda: bool(failures), "the failure is told")
    assert len(failures) == 1
    text = f"shard 2 of 3 (process {crew.pids[1]}) was killed by SIGKILL; the server ends"
    assert str(failures[0]).startswith(text)
    assert breaks_device(failures[0])
    assert aborted == [True]
    wait_until(lambda: all(gone(pid) for pid in crew.pids), "the others end")
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="was killed by SIGKILL"), crew.together():
            raise AssertionError("nothing runs any more")
    late: list[BaseException] = []
    crew.watch(late.append)
    assert late == failures


def test_orders_to_a_process_that_reads_nothing_do_not_hang(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "GRACE", 0.1)
    crew = start("never ends")
    crew.wait_ready()
    with pytest.raises(DeviceLostError, match="waited too long"), crew.together():
        for _ in range(1000):
            crew.send(Drop(tuple(range(1000))))


def test_what_a_process_failed_with_is_the_error_of_what_waits_for_it(start: Start) -> None:
    crew = start("fails at the first order")
    crew.wait_ready()
    with pytest.raises(DeviceLostError, match="failed: IndexError: no such row"), crew.together():
        crew.send(Drop(()))
        raise RuntimeError("connection closed by peer")


def test_whatever_fails_in_this_process_ends_the_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "GRACE", 0.1)
    crew = start("never ends")
    crew.wait_ready()
    with pytest.raises(DeviceLostError, match=r"shard 0 failed.*: out of memory"), crew.together():
        raise RuntimeError("out of memory")
    wait_until(lambda: gone(crew.pids[0]), "the other shard ends")
