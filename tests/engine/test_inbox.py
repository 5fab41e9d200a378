"""What crosses between the step thread and all others."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from lorastack.engine.inbox import EngineState, Inbox
from lorastack.errors import InternalError, ResourceExhaustedError, UnavailableError


def nothing() -> None:
    pass


def test_requests_count_from_their_submission_on() -> None:
    inbox, rows = Inbox(max_queue=2), list[int]()
    inbox.submit(lambda: rows.append(1))
    inbox.submit(lambda: rows.append(2))
    assert (inbox.num_rows, inbox.num_waiting) == (2, 2)
    with pytest.raises(ResourceExhaustedError, match="2 requests"):
        inbox.submit(nothing)
    inbox.carry_out(lambda: EngineState(num_rows=len(rows), num_waiting=1))
    assert rows == [1, 2]
    assert (inbox.num_rows, inbox.num_waiting) == (2, 1)
    inbox.submit(nothing)
    assert (inbox.num_rows, inbox.num_waiting) == (3, 2)


def test_draining_refuses_requests_and_takes_commands_until_the_end() -> None:
    inbox, done = Inbox(max_queue=2), list[str]()
    assert inbox.drain(0.0)
    with pytest.raises(UnavailableError):
        inbox.submit(nothing)
    assert inbox.post(lambda: done.append("before"))
    inbox.close()
    assert not inbox.post(lambda: done.append("after"))
    inbox.carry_out(EngineState)
    assert done == ["before"]


def test_a_rest_ends_at_once_where_there_is_something_to_do() -> None:
    """It would be for ever."""
    inbox = Inbox(max_queue=2)
    inbox.wake()
    inbox.rest(None)
    inbox.post(nothing)
    inbox.rest(None)
    inbox.close()
    inbox.rest(None)


def test_a_command_that_raises_fails_its_future_alone() -> None:
    inbox, done = Inbox(max_queue=2), list[str]()
    first: Future[None] = Future()
    second: Future[None] = Future()

    def explode() -> None:
        raise ValueError("boom")

    inbox.post(explode, first)
    inbox.post(lambda: second.set_result(done.append("second")), second)
    inbox.carry_out(EngineState)
    assert isinstance(first.exception(0), InternalError)
    assert second.result(0) is None and done == ["second"]
