"""What the step loop lets others see."""

from __future__ import annotations

from unittest.mock import Mock

from lorastack.engine.inbox import Inbox
from lorastack.engine.loop import StepLoop
from tests.engine.made_up import World, make_request, make_row


def make_loop(world: World, inbox: Inbox) -> StepLoop:
    unused = dict.fromkeys(
        ("runner", "pool", "pace", "costs", "speculator", "on_events", "on_failure"), Mock()
    )
    return StepLoop(inbox=inbox, scheduler=world.scheduler, pages=world.pages, **unused)


def test_failures_of_heads_may_be_read_while_others_fail() -> None:
    inbox = Inbox(max_queue=1)
    loop = make_loop(World(), inbox)
    loop._note_failures(["a", "a"])
    loop._publish()
    reading = iter(inbox.state.heads_failures.items())
    assert next(reading) == ("a", 2)
    loop._note_failures(["b", "a"])
    loop._publish()
    assert list(reading) == []
    assert inbox.state.heads_failures == {"a": 3, "b": 1}


def test_the_state_of_a_step_is_one_moment() -> None:
    """Whatever the next step does to rows and pages, until it publishes."""
    world, inbox = World(), Inbox(max_queue=1)
    loop = make_loop(world, inbox)
    assert inbox.state.num_pages == {"held": 0, "cached": 0, "free": 16}
    world.scheduler.add(make_row(make_request("row", [1] * 9, 1, ignore_eos=True)))
    while not world.pages.num_held:
        world.scheduler.schedule()
    assert inbox.state.num_rows == 0 and inbox.state.num_pages["free"] == 16
    loop._publish()
    assert inbox.state.num_rows == 1
    assert inbox.state.num_pages == {"held": 3, "cached": 0, "free": 13}
