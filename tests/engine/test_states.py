"""States go with their tokens: what a row does not take of a step, its event does not show."""

from __future__ import annotations

import torch

from lorastack.engine.batch import RowResult
from lorastack.request import TokenSource
from tests.engine.made_up import make_request, make_row


def test_states_behind_the_end_of_a_row_are_cut() -> None:
    """A tree may hold tokens behind the one that ends the row."""
    states_TH = torch.arange(8.0).view(4, 2)
    result = RowResult(tokens=(5, 6, 7, 8), sources=(TokenSource.HEADS,) * 3, states=states_TH)
    row = make_row(make_request("a", [1, 2], max_new=3, capture_states=True))
    event = row.append(result, frozenset(), now=1.0)
    assert event.final is not None and len(event.tokens) == 3
    assert isinstance(event.states, torch.Tensor)
    assert torch.equal(event.states, states_TH[:3])


def test_states_of_a_row_that_goes_on() -> None:
    row = make_row(make_request("a", [1, 2], max_new=9, capture_states=True))
    states_TH = torch.ones(1, 2)
    event = row.append(RowResult(tokens=(5,), states=states_TH), frozenset(), now=1.0)
    assert event.final is None and event.states is not None and len(event.states) == 1
    event = row.append(RowResult(tokens=(6,)), frozenset(), now=1.0)
    assert event.states is None
