"""The device pool: budgets, pins, order of use, failures, and that somebody always gets on."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import pytest
import torch

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.memory.threads import JobThread
from lorastack.errors import (
    DataLossError,
    DeviceLostError,
    FailedPreconditionError,
    InternalError,
    Reason,
)
from tests.adapters.pools import WAIT, Bench, Views, bench, resident
from tests.adapters.test_host import packed
from tests.helpers.streams import FakeDevice


def test_a_miss_then_a_hit(ten: Bench) -> None:
    assert ten.pool.acquire(["a"]) is None
    ten.settle()
    (found,) = ten.pool.acquire(["a"]) or ()
    assert (found.digest, found.nbytes) == ("a", 1)
    assert resident(ten.pool) == [("a", 1, 1)]
    ten.pool.release(["a"])
    assert resident(ten.pool) == [("a", 1, 0)]


def test_nothing_is_copied_on_a_cpu() -> None:
    source = packed("a", 1)
    with bench(load=lambda digest: source) as made:
        (found,) = made.hold("a")
        assert found.buffer is source.buffer
        assert found.layout is source.layout


def test_all_or_none(ten: Bench) -> None:
    ten.use("a")
    assert ten.pool.acquire(["a", "b"]) is None
    assert ten.resident == {"a": 0}
    ten.settle()
    found = ten.pool.acquire(["b", "a"])
    assert found is not None
    assert [adapter.digest for adapter in found] == ["b", "a"]
    assert ten.resident == {"b": 1, "a": 1}


def test_no_digests_need_nothing(ten: Bench) -> None:
    assert ten.pool.acquire([]) == ()
    ten.pool.release([])


def test_a_bundle_is_pinned_twice(ten: Bench) -> None:
    assert len(ten.hold("a", "a")) == 2
    assert ten.resident == {"a": 2}
    ten.pool.release(["a"])
    assert ten.resident == {"a": 1}


def test_waiting_rows_load_once(ten: Bench) -> None:
    for _ in range(3):
        assert ten.pool.acquire(["a"]) is None
    ten.settle()
    assert ten.loads == ["a"]


def test_the_least_recently_used_goes(ten: Bench) -> None:
    ten.use("a")
    ten.use("b")
    ten.use("d")
    ten.use("a")  # now b is the oldest
    ten.use("e")  # 1 + 2 + 4 + 5 > 10
    assert ten.resident == {"d": 0, "a": 0, "e": 0}
    ten.use("b")
    assert ten.resident == {"a": 0, "e": 0, "b": 0}
    assert ten.loads == ["a", "b", "d", "e"]  # the second time from the host


def test_pinned_ones_stay_and_others_wait(ten: Bench) -> None:
    ten.hold("d")
    ten.hold("e")
    assert ten.pool.acquire(["c"]) is None
    ten.settle()
    assert ten.pool.acquire(["c"]) is None
    assert ten.resident == {"d": 1, "e": 1}
    assert not ten.pool.poll()
    assert ten.pool.acquire(["c"]) is None
    ten.pool.release(["d"])
    assert ten.pool.poll()
    assert ten.pool.acquire(["c"]) is not None
    assert ten.resident == {"e": 1, "c": 1}
    assert ten.loads == ["d", "e", "c"]


def test_nothing_is_evicted_in_vain(ten: Bench) -> None:
    ten.use("a")
    ten.hold("d")
    ten.hold("c")
    assert ten.pool.acquire(["e"]) is None  # even without a there is no room
    ten.settle()
    assert set(ten.resident) == {"a", "d", "c"}


def test_what_nobody_waits_for_is_forgotten(ten: Bench) -> None:
    ten.hold("d")
    ten.hold("e")
    assert ten.pool.acquire(["c"]) is None
    ten.settle()
    ten.pool.poll()  # c's row is gone: nobody asked since
    ten.pool.release(["d", "e"])
    assert not ten.pool.poll()
    assert set(ten.resident) == {"d", "e"}


def test_too_large_for_the_device(ten: Bench) -> None:
    assert ten.pool.acquire(["too-large"]) is None
    ten.settle()
    with pytest.raises(FailedPreconditionError, match="11 bytes") as refusal:
        ten.pool.acquire(["too-large"])
    assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE
    ten.use("a")


def test_a_stack_too_large_for_the_device(ten: Bench) -> None:
    stack = ["c", "d", "e"]
    with pytest.raises(FailedPreconditionError, match="12 bytes") as refusal:
        for _ in range(3):
            assert ten.pool.acquire(stack) is None
            ten.settle()
    assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE
    ten.pool.poll()
    ten.use("c", "d")


def test_a_failed_load_is_told_to_all_who_ask_then_tried_again() -> None:
    answers: list[PackedAdapter | Exception] = [
        DataLossError("gone"),
        ValueError("our bug"),
        packed("a", 1),
    ]

    def load(digest: str) -> PackedAdapter:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with bench(load=load) as made:
        assert made.pool.acquire(["a"]) is None
        made.settle()
        for _ in range(2):
            with pytest.raises(DataLossError, match="gone"):
                made.pool.acquire(["a"])
        made.pool.poll()
        assert made.pool.acquire(["a"]) is None
        made.settle()
        with pytest.raises(InternalError, match="our bug"):
            made.pool.acquire(["a"])
        made.pool.poll()
        made.use("a")


def test_a_failed_load_is_tried_again_though_it_is_wanted_all_along() -> None:
    answers: list[PackedAdapter | None] = [None, packed("a", 1)]

    def load(digest: str) -> PackedAdapter:
        if (answer := answers.pop(0)) is None:
            raise DataLossError("gone")
        return answer

    with bench(load=load) as made:
        for _ in range(3):
            made.pool.prefetch("a")
            made.settle()
        with pytest.raises(DataLossError):
            made.pool.acquire("a")
        for _ in range(3):
            made.pool.prefetch("a")
            made.settle()
        assert made.resident == {"a": 0}


def test_what_steps_read_is_made_in_a_thread(ten: Bench) -> None:
    """By the one that loads, or by another where nothing is to load."""
    (found,) = ten.hold("a")
    assert found.views == Views(found.buffer.data_ptr(), "adapter-loads")
    ten.pool.release("a")
    for digest in "edb":  # for the last of them a leaves the device
        ten.use(digest)
    (again,) = ten.hold("a")
    assert again is not found and ten.loads.count("a") == 1
    assert again.views == Views(found.buffer.data_ptr(), "adapter-views")


def test_a_load_that_breaks_the_device_is_raised() -> None:
    def load(digest: str) -> PackedAdapter:
        raise DeviceLostError("gone")

    with bench(load=load) as made:
        made.pool.acquire("a")
        with pytest.raises(DeviceLostError, match="gone"):
            made.settle()


def test_loads_run_at_low_priority_elsewhere() -> None:
    seen: list[tuple[int, bool]] = []
    main = threading.get_native_id()

    def load(digest: str) -> PackedAdapter:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.append((nice, threading.get_native_id() == main))
        return packed(digest, 1)

    before = os.getpriority(os.PRIO_PROCESS, main)
    with bench(load=load) as made:
        made.use("a")
    assert seen == [(10, False)]
    assert os.getpriority(os.PRIO_PROCESS, main) == before


def test_a_thread_without_jobs_has_other_things_to_do() -> None:
    """Until they are done, or a job comes."""
    began, go_on, left = threading.Event(), threading.Event(), ["last", "first"]

    def idle() -> bool:
        began.set()
        assert go_on.wait(WAIT)
        return bool(left) and bool(left.pop())

    ended = threading.Event()
    thread: JobThread[str] = JobThread("test", ended.set, idle)
    assert began.wait(WAIT)
    thread.submit("job", lambda: ",".join(left))
    go_on.set()
    assert ended.wait(WAIT)
    assert list(thread.finished()) == ["last"]
    thread.close()
    assert not left


def test_the_end_of_a_thread_does_not_wait_for_jobs_that_have_not_begun() -> None:
    began, go_on, ran = threading.Event(), threading.Event(), list[str]()
    thread: JobThread[object] = JobThread("test", lambda: None)

    def first() -> bool:
        began.set()
        return go_on.wait(WAIT)

    thread.submit("first", first)
    assert began.wait(WAIT)
    for name in ("second", "third"):
        thread.submit(name, partial(ran.append, name))
    closing = threading.Thread(target=thread.close)
    closing.start()
    end = time.monotonic() + WAIT
    while thread._jobs.qsize() != 1:  # the word to end
        assert time.monotonic() < end
        time.sleep(0.001)
    go_on.set()
    closing.join(WAIT)
    assert not closing.is_alive() and not ran


def test_the_step_thread_never_waits_for_a_load() -> None:
    gate = threading.Event()

    def load(digest: str) -> PackedAdapter:
        assert gate.wait(WAIT)
        return packed(digest, 1)

    with bench(load=load) as made:
        for _ in range(3):
            assert made.pool.acquire(["a"]) is None
            assert not made.pool.poll()
        gate.set()
        made.use("a")


def test_a_device_of_its_own_gets_a_copy() -> None:
    source = packed("a", 3)
    source.buffer.copy_(torch.tensor([1, 2, 3]))
    with bench(load=lambda digest: source, device=FakeDevice()) as made:
        (found,) = copied(made, "a")
        assert found.buffer.tolist() == [1, 2, 3]
        assert found.buffer.data_ptr() != source.buffer.data_ptr()
        assert resident(made.pool) == [("a", 3, 1)]


def copied(made: Bench, digest: str) -> tuple[DeviceAdapter, ...]:
    """Acquires on a device that needs a second job, the copy."""
    made.pool.acquire([digest])
    made.settle()
    return made.hold(digest)
