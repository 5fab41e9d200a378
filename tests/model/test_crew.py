"""The processes of a model's other shards: how they start and end, and who hears of it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import torch

from lorastack.errors import DeviceLostError, breaks_device
from lorastack.model.backends.parallel import crew as crew_module
from lorastack.model.backends.parallel import worker as worker_module
from lorastack.model.backends.parallel.crew import READY, Crew
from lorastack.model.backends.parallel.orders import Drop, Join, Setup
from lorastack.model.backends.parallel.shards import Shard
from lorastack.model.config import load_config
from tests.helpers.live import wait_until
from tests.test_layering import ROOT

Start = Callable[..., Crew]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def setup_of(folder: Path, shard: Shard, timeout: float = 60.0) -> Setup:
    return Setup(
        shard=shard,
        folder=folder,
        config=load_config(folder, None),
        device=torch.device("cpu"),
        dtype=torch.float32,
        threads=torch.get_num_threads(),
        timeout=timeout,
    )


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Iterator[Start]:
    """start(what the processes do, how many, seconds of patience): not yet waited for."""
    crews: list[Crew] = []

    def build(behaviour: str, count: int = 1, timeout: float = 60.0) -> Crew:
        monkeypatch.setattr(crew_module, "_MODULE", "tests.helpers.shard_script")
        monkeypatch.setenv("SHARD", behaviour)
        path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        shards = Shard(0, count + 1).all[1:]
        crews.append(Crew([setup_of(tiny_llama, shard, timeout) for shard in shards]))
        return crews[-1]

    yield build
    for crew in crews:
        crew.close()
        assert all(gone(pid) for pid in crew.pids)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch, start: Start) -> Crew:
    """One process that is ready and then does nothing; there is little patience with it."""
    monkeypatch.setattr(crew_module, "GRACE", 0.1)
    crew = start("does nothing", timeout=1.0)
    crew.wait_ready()
    return crew


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


def test_a_process_that_does_not_end_is_ended(stuck: Crew) -> None:
    stuck.close()
    assert gone(stuck.pids[0])


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


def test_what_lies_in_the_working_directory_is_not_imported(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "multiprocessing.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    start("ends when told").wait_ready()


def test_a_shard_joins_the_others_only_when_all_have_read_their_weights(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those wait for each other for a while only, and one may read longer than that."""
    joined: list[Setup] = []

    def join(setup: Setup, store: int) -> NoReturn:
        joined.append(setup)
        raise EOFError

    monkeypatch.setattr(worker_module, "join", join)
    for orders in ([], [Join()]):
        ours, theirs = socket.socketpair()
        to_it, its = Connection(ours.fileno()), Connection(theirs.detach())
        for message in (setup_of(tiny_llama, Shard(1, 2)), *orders):
            to_it.send_bytes(pickle.dumps(message))
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            worker_module.Worker(its, its, -1)
        ours.detach()
        assert to_it.recv_bytes() == READY
        assert len(joined) == len(orders)


# -- beside steps ---------------------------------------------------------------------------------


def test_what_is_told_beside_steps_is_done_in_its_order(start: Start) -> None:
    crew = start("ends when told", 2)
    crew.wait_ready()
    done: list[int] = []

    def tell(number: int) -> None:
        crew.tell(Drop(number))
        done.append(number)

    jobs = [crew.aside(partial(tell, number)) for number in range(3)]
    for job in jobs:
        job.result()
    assert done == [0, 1, 2]


def test_a_process_that_does_not_answer_beside_steps_is_lost(stuck: Crew) -> None:
    failures: list[BaseException] = []
    stuck.watch(failures.append)
    job = stuck.aside(lambda: stuck.tell(Drop(0)))
    with pytest.raises(DeviceLostError, match="waited too long for another one"):
        job.result()
    assert len(failures) == 1
    with pytest.raises(DeviceLostError), stuck.together():
        raise AssertionError("nothing runs any more")


def test_what_is_under_way_beside_steps_holds_up_no_end(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is no failure."""
    monkeypatch.setattr(crew_module, "GRACE", 0.1)
    crew = start("does nothing")
    crew.wait_ready()
    failures: list[BaseException] = []
    crew.watch(failures.append)
    jobs = [crew.aside(lambda: crew.tell(Drop(0))) for _ in range(2)]
    wait_until(jobs[0].running, "the first is under way")
    crew.close()
    with pytest.raises(DeviceLostError):
        jobs[0].result()
    assert jobs[1].cancelled() and failures == []


# -- failures -------------------------------------------------------------------------------------


def test_a_process_that_is_killed_is_noticed_at_once(start: Start) -> None:
    """Also while nobody asks anything of it; then every call says so, and all others are ended."""
    crew = start("does nothing", 2)
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
    wait_until(lambda: aborted == [True], "what waits for it ends")
    wait_until(lambda: all(gone(pid) for pid in crew.pids), "the others end")
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="was killed by SIGKILL"), crew.together():
            raise AssertionError("nothing runs any more")
    late: list[BaseException] = []
    crew.watch(late.append)
    assert late == failures


def test_an_end_of_what_waits_that_itself_hangs_keeps_nobody(stuck: Crew) -> None:
    failures: list[BaseException] = []
    stuck.watch(failures.append)
    released = threading.Event()
    stuck.abort_with(released.wait)
    with pytest.raises(DeviceLostError), stuck.together():
        raise RuntimeError("out of memory")
    assert len(failures) == 1
    released.set()


def test_the_file_by_which_shards_met_keeps_its_number(stuck: Crew) -> None:
    """torch writes to it by that number whenever it collects its `FileStore`."""
    stuck.close()
    assert os.readlink(f"/proc/self/fd/{stuck.store}").startswith("/memfd:lorastack-shards")


def test_orders_to_a_process_that_reads_nothing_do_not_hang(stuck: Crew) -> None:
    with pytest.raises(DeviceLostError, match="waited too long"), stuck.together():
        for number in range(100_000):
            stuck.send(Drop(number))


def test_what_a_process_failed_with_is_the_error_of_what_waits_for_it(start: Start) -> None:
    crew = start("fails at the first order")
    crew.wait_ready()
    with pytest.raises(DeviceLostError, match="failed: IndexError: no such row"), crew.together():
        crew.send(Join())
        raise RuntimeError("connection closed by peer")


def test_whatever_fails_in_this_process_ends_the_others(stuck: Crew) -> None:
    with pytest.raises(DeviceLostError, match=r"shard 0 failed.*: out of memory"), stuck.together():
        raise RuntimeError("out of memory")
    wait_until(lambda: gone(stuck.pids[0]), "the other shard ends")
