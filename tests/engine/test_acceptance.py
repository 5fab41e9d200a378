"""Whose tokens the backend samples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorastack.engine.acceptance import SampledRow
from lorastack.engine.batch import RowAdapters, RowStep
from lorastack.model.context import SampledTree
from lorastack.request import SamplingParams
from lorastack.speculation.tree import Tree
from tests.engine.made_up import make_request


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), True),
        (SamplingParams(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1), True),
        (SamplingParams(temperature=1.0, typical_p=0.5), False),
    ],
    ids=str,
)
def test_typical_p_is_sampled_on_the_host(params: SamplingParams, expected: bool) -> None:
    """A backend that samples on its device may lack it."""
    step = RowStep(
        request=replace(make_request("a", [1], 4), sampling=params),
        token_ids=(1,),
        block_table=(0,),
        committed=0,
        num_generated=0,
        samples=True,
        tree=None,
        adapters=RowAdapters(loras=(), heads=None),
        num_candidates=0,
    )
    row = SampledRow(0, step, SampledTree(Tree.root(1), 0, params, 0))
    assert row.by_backend is expected
