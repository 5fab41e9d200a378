"""Heads and their candidates: every native way and plain torch against one row at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
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
from lorastack.kernels.ops import Ops, fastest_ops
from lorastack.layout import MAX_RANK
from tests.helpers.examples import at_most
from tests.helpers.guarded import guarded
from tests.helpers.isas import (
    FLOAT32,
    FUSING,
    Variant,
    each_of,
    each_variant,
    here,
    needs_two,
)

NATIVE = each_variant()
TORCH = pytest.param(None, id="torch")
WAYS = [TORCH, *NATIVE]
# `top` is always of float32 logits.
TOPS = [TORCH, *each_of(*FLOAT32, made=lambda isa: Variant(isa, torch.float32))]
CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**20)
RANKS = (1, 3, 8, 15, 16, 17, 31, 32, 40, 64)


@contextmanager
def running(way: Variant | None, num_threads: int = 2) -> Iterator[Ops]:
    """The ops of these kernels; None: plain torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield Ops() if way is None else fastest_ops(way.dtype, 32, CPU, way.isa)
    finally:
        torch.set_num_threads(before)


def dtype_of(way: Variant | None) -> torch.dtype:
    return torch.float32 if way is None else way.dtype


class Chance:
    """Random tensors and shapes; `exact` ones give the same sums in any order."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self.hidden = 32 * self.number(1, 4)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def normal(self, *shape: int) -> Tensor:
        return guarded(torch.randn(shape, generator=self._generator).to(self._dtype))

    def whole(self, most: int, *shape: int) -> Tensor:
        numbers = torch.randint(-most, most + 1, shape, generator=self._generator)
        return guarded(numbers.to(self._dtype))

    def heads(self, *, exact: bool) -> HeadsWeights:
        """Of either version, with a draft vocabulary or without, corrected or not."""
        size, num_heads, num_blocks = self.hidden, self.number(1, 5), self.number(1, 3)
        num_outputs = self.number(1, 90)
        shape = [num_outputs, size]
        if self.number(0, 1):
            shape.insert(0, num_heads)
        ids_N = torch.arange(num_outputs) * 3 + 5 if self.number(0, 1) else None
        private = self.private(num_blocks, num_heads, exact=exact) if self.number(0, 1) else None
        if not exact:
            weight_LKHH = guarded(self.normal(num_blocks, num_heads, size, size) / size**0.5)
            bias_LKH = self.normal(num_blocks, num_heads, size)
            return HeadsWeights(weight_LKHH, bias_LKH, self.normal(*shape), ids_N, private)
        # One input an output, and a bias that keeps SiLU where it is z or 0 to the last bit.
        weight_LKHH = self.picks(size, num_blocks, num_heads, size)
        signs = torch.randint(2, weight_LKHH.shape[:3], generator=self._generator)
        bias_LKH = torch.where(signs == 1, 64, -1024).to(self._dtype)
        weights = guarded(weight_LKHH), guarded(bias_LKH), self.whole(3, *shape)
        return HeadsWeights(*weights, ids_N, private)

    def private(self, num_blocks: int, num_heads: int, *, exact: bool) -> PrivateWeights:
        """Of any rank. An exact one adds one of the inputs to each output."""
        size, rank = self.hidden, RANKS[self.number(0, len(RANKS) - 1)]
        if not exact:
            a_LKRH = self.normal(num_blocks, num_heads, rank, size) / size**0.5
            b_LKHR = self.normal(num_blocks, num_heads, size, rank) / rank**0.5
        else:
            a_LKRH = self.picks(size, num_blocks, num_heads, rank)
            b_LKHR = self.picks(rank, num_blocks, num_heads, size)
        return PrivateWeights(guarded(a_LKRH), guarded(b_LKHR))

    def picks(self, num: int, *shape: int) -> Tensor:
        """A one and zeros, [..., num]."""
        picked = torch.randint(num, shape, generator=self._generator)
        return torch.nn.functional.one_hot(picked, num).to(self._dtype)

    def groups(self, *, exact: bool) -> list[HeadsGroup]:
        """Some of them the ones before under another private part, with the same outputs or not."""
        groups: list[HeadsGroup] = []
        for _ in range(self.number(0, 4)):
            start = groups[-1].end if groups else self.number(0, 2)
            end = start + (0, 1, 2, 5, 16, 17, 33)[self.number(0, 6)]
            if groups and self.number(0, 1):
                heads = self.under_another(groups[-1].heads, exact=exact)
            else:
                heads = self.heads(exact=exact)
            groups.append(HeadsGroup(start, end, heads))
        return groups

    def under_another(self, heads: HeadsWeights, *, exact: bool) -> HeadsWeights:
        shape = len(heads.bias_LKH), heads.num_heads
        heads = replace(heads, private=self.private(*shape, exact=exact))
        if self.number(0, 1):
            return heads
        num_outputs = self.number(1, 90)
        output = (
            self.whole(3, num_outputs, self.hidden)
            if exact
            else self.normal(num_outputs, self.hidden)
        )
        return replace(heads, output=output, ids_N=torch.arange(num_outputs) * 2 + 1)


def assert_same(found: TopTokens, expected: TopTokens) -> None:
    """The very ids, and log-probabilities up to rounding."""
    assert (found.ids_XR.dtype, found.logprobs_XR.dtype) == (torch.int64, torch.float32)
    assert found.ids_XR.tolist() == expected.ids_XR.tolist()
    torch.testing.assert_close(
        found.logprobs_XR, expected.logprobs_XR, rtol=1e-6, atol=1e-5, equal_nan=True
    )


def num_rows(groups: list[HeadsGroup]) -> int:
    return max((group.end for group in groups), default=1)


@pytest.mark.parametrize("way", WAYS)
@at_most(50)
@given(SEEDS)
def test_states_equal_the_reference(way: Variant | None, seed: int) -> None:
    chance = Chance(seed, dtype_of(way))
    groups = chance.groups(exact=False)
    hidden_BH = chance.normal(num_rows(groups), chance.hidden)
    with running(way) as ops:
        found_XH = ops.states(hidden_BH, groups)
    rounded = 1e-5 if found_XH.dtype == torch.float32 else 0.03  # a bit of a value of 4
    expected_XH = states_reference(hidden_BH, groups)
    torch.testing.assert_close(found_XH, expected_XH, rtol=rounded, atol=rounded)


@pytest.mark.parametrize("way", WAYS)
@given(SEEDS, st.integers(1, MAX_RANK), st.integers(1, 3))
def test_candidates_are_the_references(
    way: Variant | None, seed: int, num: int, num_threads: int
) -> None:
    """Whole numbers: many ties, and no rounding that depends on the order of a sum."""
    chance = Chance(seed, dtype_of(way))
    groups = chance.groups(exact=True)
    hidden_BH = chance.whole(2, num_rows(groups), chance.hidden)
    with running(way, num_threads) as ops:
        found = ops.propose(hidden_BH, groups, num)
    assert_same(found, propose_reference(hidden_BH, groups, num))


@pytest.mark.parametrize("way", NATIVE)
@at_most(50)
@given(SEEDS, st.data())
def test_bits_depend_neither_on_company_nor_on_threads(
    way: Variant, seed: int, data: st.DataObject
) -> None:
    chance = Chance(seed, way.dtype)
    groups = [*chance.groups(exact=False), HeadsGroup(0, 17, chance.heads(exact=False))]
    hidden_BH = chance.normal(num_rows(groups), chance.hidden)
    place = data.draw(st.sampled_from([i for i, group in enumerate(groups) if group.num_states]))
    chosen = groups[place]
    row = data.draw(st.integers(chosen.start, chosen.end - 1))
    with running(way, data.draw(st.integers(1, 3))) as ops:
        r_XH, found = ops.states(hidden_BH, groups), ops.propose(hidden_BH, groups, 5)
    with running(way, data.draw(st.integers(1, 3))) as ops:
        alone = [HeadsGroup(0, 1, chosen.heads)]
        expected_KH = ops.states(hidden_BH[row : row + 1].clone(), alone)
        expected = ops.propose(hidden_BH[row : row + 1].clone(), alone, 5)
    before = sum(group.num_states for group in groups[:place])
    num_heads = chosen.heads.num_heads
    first = before + (row - chosen.start) * num_heads
    assert torch.equal(r_XH[first : first + num_heads], expected_KH)
    for all_XR, expected_KR in zip(found, expected, strict=True):
        assert torch.equal(all_XR[first : first + num_heads], expected_KR)


@needs_two(*FUSING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@given(SEEDS)
def test_what_widens_and_fuses_has_the_same_bits(dtype: torch.dtype, seed: int) -> None:
    """But for log-probabilities, which end in the C library's logarithm."""
    chance = Chance(seed, dtype)
    groups = chance.groups(exact=False)
    hidden_BH = chance.normal(num_rows(groups), chance.hidden)
    states, found = [], []
    for isa in here(*FUSING):
        with running(Variant(isa, dtype)) as ops:
            states.append(ops.states(hidden_BH, groups))
            found.append(ops.propose(hidden_BH, groups, 3))
    assert all(torch.equal(each_XH, states[0]) for each_XH in states)
    for each in found:
        assert_same(each, found[0])


@pytest.mark.parametrize("way", WAYS)
@at_most(20)
@given(SEEDS)
def test_a_private_part_without_b_changes_no_bit(way: Variant | None, seed: int) -> None:
    chance = Chance(seed, dtype_of(way))
    corrected, plain = [], []
    for group in [*chance.groups(exact=False), HeadsGroup(0, 3, chance.heads(exact=False))]:
        private = chance.private(len(group.heads.bias_LKH), group.heads.num_heads, exact=False)
        private.b_LKHR.zero_()
        corrected.append(replace(group, heads=replace(group.heads, private=private)))
        plain.append(replace(group, heads=replace(group.heads, private=None)))
    hidden_BH = chance.normal(num_rows(plain), chance.hidden)
    with running(way) as ops:
        assert torch.equal(ops.states(hidden_BH, corrected), ops.states(hidden_BH, plain))
        found, expected = ops.propose(hidden_BH, corrected, 3), ops.propose(hidden_BH, plain, 3)
    assert torch.equal(found.ids_XR, expected.ids_XR)
    assert torch.equal(found.logprobs_XR, expected.logprobs_XR)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_private_part_that_is_not_finite_spoils_its_own_rows(
    way: Variant | None, bad: float
) -> None:
    """Of eight that share each reading of the heads."""
    chance = Chance(2, dtype_of(way))
    shared = chance.heads(exact=False)
    num_heads = shared.num_heads
    groups = [
        HeadsGroup(start, start + 2, chance.under_another(shared, exact=False))
        for start in (0, 2, 4)
    ]
    groups.append(HeadsGroup(6, 8, replace(shared, private=None)))
    hidden_BH = chance.normal(8, chance.hidden)
    with running(way) as ops:
        plain_BKH = ops.states(hidden_BH, groups).view(8, num_heads, -1)
        assert groups[1].heads.private is not None
        groups[1].heads.private.a_LKRH[0, :, 0] = bad
        found_BKH = ops.states(hidden_BH, groups).view(8, num_heads, -1)
    others = [0, 1, 4, 5, 6, 7]
    assert torch.equal(found_BKH[others], plain_BKH[others])
    assert not found_BKH[[2, 3]].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_row_and_never_wins(way: Variant | None) -> None:
    chance = Chance(0, dtype_of(way))
    hidden_BH = chance.normal(3, chance.hidden)
    output_NH = chance.normal(70, chance.hidden)
    output_NH[5] = torch.nan
    weights = chance.heads(exact=False)
    heads = HeadsWeights(weights.weight_LKHH, weights.bias_LKH, output_NH, None)
    groups = [HeadsGroup(0, 3, heads)]
    with running(way) as ops:
        plain_XR = ops.propose(hidden_BH, groups, 64).ids_XR
        hidden_BH[1, 7] = torch.inf
        hidden_BH[1, 8] = torch.nan
        found_XR = ops.propose(hidden_BH, groups, 64).ids_XR
    assert 5 not in plain_XR
    rows = found_XR.view(3, -1), plain_XR.view(3, -1)
    assert torch.equal(rows[0][0], rows[1][0])
    assert torch.equal(rows[0][2], rows[1][2])
    assert rows[0][1].view(-1, 64).tolist() == [list(range(64))] * heads.num_heads


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_spoils_its_head_in_its_row(
    way: Variant | None, bad: float
) -> None:
    """All of that head's log-probabilities there, the others' nowhere."""
    chance = Chance(0, dtype_of(way))
    hidden_BH, output_KNH = chance.normal(3, chance.hidden), chance.normal(2, 70, chance.hidden)
    # Blocks that add nothing: a state is its row. One large input makes one logit overflow.
    weight_LKHH = torch.zeros(1, 2, chance.hidden, chance.hidden, dtype=hidden_BH.dtype)
    heads = HeadsWeights(weight_LKHH, weight_LKHH[..., 0].contiguous(), output_KNH, None)
    hidden_BH[:, 0] = 0
    output_KNH[1, 69], output_KNH[:, :, 0] = 0, 0
    groups = [HeadsGroup(0, 3, heads)]
    with running(way) as ops:
        plain_BKR = ops.propose(hidden_BH, groups, 4).logprobs_XR.view(3, 2, 4)
        hidden_BH[1, 0] = 1e20
        output_KNH[1, 69, 0] = bad if math.isnan(bad) else math.copysign(1e20, bad)
        found_BKR = ops.propose(hidden_BH, groups, 4).logprobs_XR.view(3, 2, 4)
    spoilt_BK = found_BKR.isnan().all(dim=-1)
    expected = torch.tensor(
        [[0, 1], [0, 1], [0, 1]] if math.isnan(bad) else [[0, 0], [0, 1], [0, 0]]
    )
    assert torch.equal(spoilt_BK, expected == 1)
    assert torch.equal(found_BKR[~spoilt_BK], plain_BKR[~spoilt_BK])


def test_the_head_maths_of_the_formats_page() -> None:
    """Head 2 of version 1: two blocks in a row, then its own output matrix."""
    chance = Chance(1, torch.float32)
    size = chance.hidden
    weight_LKHH, bias_LKH = chance.normal(2, 2, size, size) / 8, chance.normal(2, 2, size)
    output_KNH, x_H = chance.normal(2, 40, size), chance.normal(size)
    r_H = x_H
    for block in range(2):
        z_H = weight_LKHH[block, 1] @ r_H + bias_LKH[block, 1]
        r_H = r_H + z_H / (1 + torch.exp(-z_H))
    groups, ops = [HeadsGroup(0, 1, HeadsWeights(weight_LKHH, bias_LKH, output_KNH, None))], Ops()
    torch.testing.assert_close(ops.states(x_H[None], groups)[1], r_H)
    best_R = (output_KNH[1] @ r_H).argsort(descending=True)[:4]
    found = ops.propose(x_H[None], groups, 4)
    assert torch.equal(found.ids_XR[1], best_R)
    expected_R = (output_KNH[1] @ r_H).log_softmax(0)[best_R]
    torch.testing.assert_close(found.logprobs_XR[1], expected_R)


LEVELS = (-torch.inf, -1.0, 0.0, 2.0, 2.5, torch.nan, torch.inf)


@pytest.mark.parametrize("way", TOPS)
@given(SEEDS, st.integers(1, 90), st.integers(1, MAX_RANK), st.integers(1, len(LEVELS)))
def test_top_equals_a_full_sort(
    way: Variant | None, seed: int, columns: int, num: int, num_levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(num_levels, (3, columns), generator=generator)
    logits_XV = guarded(torch.tensor(LEVELS)[picked])
    with running(way) as ops:
        found = ops.top(logits_XV, num)
    assert_same(found, top_reference(logits_XV, num))


@pytest.mark.parametrize("way", TOPS)
def test_top_of_a_whole_vocabulary(way: Variant | None) -> None:
    logits_XV = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    expected_XR = logits_XV.argsort(dim=1, descending=True)[:, :7]
    logprobs_XR = logits_XV.double().log_softmax(-1).gather(1, expected_XR).float()
    with running(way) as ops:
        assert_same(ops.top(logits_XV, 7), TopTokens(expected_XR, logprobs_XR))
        assert ops.top(torch.zeros(2, 50_000), 3).ids_XR.tolist() == [[0, 1, 2]] * 2
