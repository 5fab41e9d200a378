"""Heads and their candidates by addresses, against one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.heads import (
    HeadsGroup,
    HeadsWeights,
    PrivateWeights,
    TopTokens,
    propose_reference,
    states_reference,
    top_reference,
)
from lorastack.kernels.triton import heads as module
from lorastack.kernels.triton import top as top_module
from lorastack.kernels.triton.heads import logits, states
from lorastack.kernels.triton.heads_plan import FIELDS, Layout, Pairs, lay_out
from lorastack.kernels.triton.top import top
from tests.helpers.examples import at_most

DTYPES = [torch.float32, torch.bfloat16]
NUM_ROWS = 28
UNSEEN = -7  # what a pair holds that is not written


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of logits take several, and inputs of private parts."""
    monkeypatch.setattr(top_module, "BLOCK", 32)
    monkeypatch.setattr(module, "CHUNK", 16)


def pairs_of(layout: Layout, device: torch.device) -> Pairs:
    """With room for more, which holds garbage."""

    def padded(values: Sequence[object], dtype: torch.dtype, spare: object = UNSEEN) -> Tensor:
        return torch.tensor([*values, spare], dtype=dtype, device=device)

    tile = [UNSEEN] * FIELDS
    counts = [len(layout.states), len(layout.outputs), len(layout.tree_Y)]
    return Pairs(
        padded(layout.states, torch.int64, tile),
        padded(layout.outputs, torch.int64, tile),
        padded(layout.tree_Y, torch.int32),
        padded(layout.num_outputs_Y, torch.int32),
        padded(layout.ids_Y, torch.int64),
        torch.tensor(counts, dtype=torch.int32, device=device),
    )


class Heads:
    """Heads of several kinds. `exact` ones give the same sums in any order."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, *, exact: bool) -> None:
        self._size, self._dtype, self._device, self._exact = size, dtype, device, exact
        self._generator = torch.Generator().manual_seed(size)

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator)
        return values.to(self._device, self._dtype)

    def whole(self, *shape: int) -> Tensor:
        """Small whole numbers: many ties."""
        values = torch.randint(-2, 3, shape, generator=self._generator)
        return values.to(self._device, self._dtype)

    def make(self, num_heads: int, num_blocks: int, num_outputs: int, kind: str) -> HeadsWeights:
        """kind: of the outputs, "own" ones of each head, "shared", or "named" by ids as well."""
        size = self._size
        shape = (num_heads, num_outputs, size) if kind == "own" else (num_outputs, size)
        ids_N = None
        if kind == "named":
            ids_N = torch.arange(num_outputs, device=self._device) * 3 + 5
        if not self._exact:
            weight_LKHH = self.normal(num_blocks, num_heads, size, size) / size**0.5
            bias_LKH = self.normal(num_blocks, num_heads, size)
            return HeadsWeights(weight_LKHH, bias_LKH, self.normal(*shape), ids_N)
        # One input an output, and a bias that keeps SiLU where it is z or 0 to the last bit.
        weight_LKHH = self.picks(size, num_blocks, num_heads, size)
        signs = torch.randint(2, weight_LKHH.shape[:3], generator=self._generator)
        bias_LKH = torch.where(signs == 1, 64, -1024).to(self._device, self._dtype)
        return HeadsWeights(weight_LKHH, bias_LKH, self.whole(*shape), ids_N)

    def private(self, heads: HeadsWeights, rank: int) -> PrivateWeights:
        """An exact one adds one of the inputs to each output."""
        num_blocks, num_heads, size = heads.bias_LKH.shape
        if not self._exact:
            a_LKRH = self.normal(num_blocks, num_heads, rank, size) / size**0.5
            b_LKHR = self.normal(num_blocks, num_heads, size, rank) / rank**0.5
            return PrivateWeights(a_LKRH, b_LKHR)
        return PrivateWeights(
            self.picks(size, num_blocks, num_heads, rank),
            self.picks(rank, num_blocks, num_heads, size),
        )

    def picks(self, num: int, *shape: int) -> Tensor:
        """A one and zeros, [..., num]."""
        picked = torch.randint(num, shape, generator=self._generator)
        return torch.nn.functional.one_hot(picked, num).to(self._device, self._dtype)

    def groups(self) -> list[HeadsGroup]:
        """Few rows and more than a tile has, of heads that differ in everything; one is empty.
        Some have private parts, three of them the same heads and one of these other outputs."""
        named, own = self.make(2, 2, 70, "named"), self.make(1, 1, 9, "own")
        other = self.make(2, 2, 33, "named")
        brought = replace(named, output=other.output, ids_N=other.ids_N)
        return [
            HeadsGroup(1, 2, named),
            HeadsGroup(2, 2, self.make(1, 1, 9, "shared")),
            HeadsGroup(2, 19, replace(own, private=self.private(own, 20))),
            HeadsGroup(19, 20, self.make(3, 1, 3, "own")),
            HeadsGroup(20, 24, self.make(3, 1, 40, "shared")),
            HeadsGroup(24, 25, replace(named, private=self.private(named, 3))),
            HeadsGroup(25, 26, replace(named, private=self.private(named, 64))),
            HeadsGroup(26, 28, replace(brought, private=self.private(named, 7))),
        ]


class Step:
    """Trees, whose ends lie in an order of their own."""

    def __init__(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> None:
        device = hidden_BH.device
        layout = lay_out([(each.heads, range(each.start, each.end)) for each in groups])
        self.layout, self.pairs = layout, pairs_of(layout, device)
        order = torch.randperm(len(hidden_BH), generator=torch.Generator().manual_seed(0))
        self.ends_B = order.to(device, torch.int32)
        self.hidden_XH = torch.empty_like(hidden_BH)
        self.hidden_XH[order.to(device)] = hidden_BH
        self.num_blocks = max(len(each.heads.bias_LKH) for each in groups)
        self.room = len(layout.tree_Y) + 1

    def states(self) -> Tensor:
        """r_LYH."""
        shape = (self.num_blocks, self.room, self.hidden_XH.shape[1])
        r_LYH = self.hidden_XH.new_full(shape, torch.nan)
        num_tiles, max_rank = len(self.layout.states) + 1, self.layout.max_rank
        inputs = (self.hidden_XH, self.ends_B, self.pairs)
        states(*inputs, r_LYH, num_tiles, self.num_blocks, max_rank)
        return r_LYH

    def propose(self, num: int) -> TopTokens:
        r_LYH = self.states()
        logits_YN = torch.full((self.room, 73), torch.nan, device=r_LYH.device)
        logits(r_LYH, self.pairs, logits_YN, len(self.layout.outputs) + 1)
        return ranked(logits_YN, self.pairs, num)


def ranked(logits_YN: Tensor, pairs: Pairs, num: int) -> TopTokens:
    """The last pair must stay as it was."""
    shape, device = (len(logits_YN), num), logits_YN.device
    ids_YR = torch.full(shape, UNSEEN, dtype=torch.int32, device=device)
    logprobs_YR = torch.full(shape, float(UNSEEN), device=device)
    top(logits_YN, pairs, ids_YR, logprobs_YR, len(logits_YN))
    assert ids_YR[-1].eq(UNSEEN).all() and logprobs_YR[-1].eq(UNSEEN).all()
    return TopTokens(ids_YR[:-1].long(), logprobs_YR[:-1])


def assert_same(found: TopTokens, expected: TopTokens) -> None:
    """The very ids, and log-probabilities up to rounding."""
    assert found.ids_XR.tolist() == expected.ids_XR.tolist()
    torch.testing.assert_close(
        found.logprobs_XR, expected.logprobs_XR, rtol=1e-6, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_the_references(device: torch.device, dtype: torch.dtype) -> None:
    """The last state of every pair, of one block and of two."""
    made = Heads(24, dtype, device, exact=False)
    groups = made.groups()
    hidden_BH = made.normal(NUM_ROWS, 24)
    step = Step(hidden_BH, groups)
    r_LYH = step.states()
    blocks = [
        len(each.heads.bias_LKH)
        for each in groups
        for _ in range((each.end - each.start) * each.heads.num_heads)
    ]
    last_YH = torch.stack([r_LYH[count - 1, pair] for pair, count in enumerate(blocks)])
    rounded = 1e-5 if dtype == torch.float32 else 0.03  # a bit of a value of 4
    torch.testing.assert_close(
        last_YH, states_reference(hidden_BH, groups), rtol=rounded, atol=rounded
    )
    assert r_LYH[:, -1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_private_part_without_b_changes_no_bit(device: torch.device, dtype: torch.dtype) -> None:
    made = Heads(24, dtype, device, exact=False)
    heads = made.make(2, 2, 9, "shared")
    private = made.private(heads, 5)
    private.b_LKHR.zero_()
    corrected = replace(heads, private=private)
    hidden_BH = made.normal(3, 24)
    r_LYH = Step(hidden_BH, [HeadsGroup(0, 3, heads)]).states()
    found_LYH = Step(hidden_BH, [HeadsGroup(0, 3, corrected)]).states()
    assert torch.equal(found_LYH[:, :-1], r_LYH[:, :-1])


@pytest.mark.parametrize(("dtype", "num"), [(torch.float32, 10), (torch.bfloat16, 1)])
def test_candidates_are_the_references(device: torch.device, dtype: torch.dtype, num: int) -> None:
    """Of heads with fewer outputs than `num` too."""
    made = Heads(32, dtype, device, exact=True)
    groups = made.groups()
    hidden_BH = made.whole(NUM_ROWS, 32)
    assert_same(Step(hidden_BH, groups).propose(num), propose_reference(hidden_BH, groups, num))


def test_heads_without_outputs_have_states_alone(device: torch.device) -> None:
    made = Heads(32, torch.float32, device, exact=False)
    heads = made.make(2, 1, 5, "shared")
    layout = lay_out([(HeadsWeights(heads.weight_LKHH, heads.bias_LKH, None, None), [4, 6])])
    assert layout.tree_Y == [4, 4, 6, 6]
    assert len(layout.states) == 2 and layout.outputs == []
    assert layout.num_outputs_Y == layout.ids_Y == [0] * 4


LEVELS = [-torch.inf, -1.5, -0.0, 0.0, 2.0, 2.0, 3.0, 40.0]
ODD = [*LEVELS, torch.inf, torch.nan, -torch.nan]


@at_most(15)
@given(
    st.integers(0, 2**20),
    st.lists(st.integers(1, 100), min_size=1, max_size=3),
    st.sampled_from([1, 2, 7, 64]),
    st.sampled_from([LEVELS, LEVELS[1:], ODD, None]),
)
def test_the_best_of_any_logits(
    device: torch.device, seed: int, sizes: list[int], num: int, levels: list[float] | None
) -> None:
    """Few levels, so that ties are everywhere. A pair's outputs end before its row does."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sizes) + 1, 103)
    logits_YN = torch.randn(shape, generator=generator) * 10
    if levels is not None:
        logits_YN = torch.tensor(levels)[torch.randint(len(levels), shape, generator=generator)]
    layout = Layout([], [], [0] * len(sizes), sizes, [0] * len(sizes))
    found = ranked(logits_YN.to(device), pairs_of(layout, device), num)
    best = [
        top_reference(row_N[None, :size], num)
        for row_N, size in zip(logits_YN, sizes, strict=False)
    ]
    ids, logprobs = zip(*best, strict=True)
    assert_same(
        TopTokens(found.ids_XR.cpu(), found.logprobs_XR.cpu()),
        TopTokens(torch.cat(ids), torch.cat(logprobs)),
    )
