"""Best tokens and draws of all nodes at once, against the references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.best import best_torch
from lorastack.kernels.gumbel import hash_reference, uniform_reference
from lorastack.kernels.sample import Sample, sample_torch
from lorastack.kernels.triton import samples as module
from lorastack.kernels.triton.samples import SETTINGS, Nodes, Sampled, num_spans, settings_of
from lorastack.request import SamplingParams
from lorastack.sampling.reference import sample_reference
from tests.helpers.examples import at_most
from tests.helpers.logits import LOGITS_KINDS, make_logits

UNSEEN = -7  # what an output holds that is not written
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0, 1e3, 1e50]),
    top_k=st.sampled_from([0, 0, 1, 5, 17, 40, 200]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows take several."""
    monkeypatch.setattr(module, "SPAN", 64)
    monkeypatch.setattr(module, "BLOCK", 64)


def run(logits_XV: Tensor, samples: Sequence[Sample], device: torch.device) -> Sampled:
    """Each of `samples` is a tree of one node, no two of one row. One row more has room."""
    room, vocab = len(logits_XV) + 1, logits_XV.shape[1]
    trees = {each.row: tree for tree, each in enumerate(samples)}
    settings = [settings_of(each.params, each.token_index) for each in samples]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    nodes = Nodes(
        ints([trees.get(row, -1) for row in range(room)]),
        ints([0] * room),
        torch.tensor(settings or [(0,) * SETTINGS], device=device),
        ints([len(logits_XV)]),
    )
    out = Sampled(ints([UNSEEN] * room).float(), *(ints([UNSEEN] * room) for _ in range(2)))
    keys_XS = torch.zeros(room, num_spans(vocab), dtype=torch.int64, device=device)
    padded_XV = torch.full((room, vocab + 3), torch.nan)  # a row's end is not its buffer's
    padded_XV[:-1, :vocab] = logits_XV
    module.sample(padded_XV.to(device)[:, :vocab], nodes, keys_XS, out, room)
    assert [each[-1].item() for each in out] == [UNSEEN] * 3
    return Sampled(*(each[:-1].cpu() for each in out))


def sample(logits_XV: Tensor, samples: Sequence[Sample], device: torch.device) -> list[int]:
    tokens: list[int] = run(logits_XV, samples, device).tokens_X.tolist()
    return [tokens[each.row] for each in samples]


def repeated(params: SamplingParams, count: int) -> list[Sample]:
    """The first `count` tokens, each of a row of its own."""
    return [Sample(row, params, row) for row in range(count)]


@at_most(8)
@given(st.integers(0, 2**20), st.sampled_from([1, 3, 64, 65, 150]))
def test_the_best_are_the_references(device: torch.device, seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 2.5, torch.inf])
    logits_XV = levels[torch.randint(len(levels), (5, size), generator=generator)]
    logits_XV[4, seed % size] = torch.nan
    found = run(logits_XV, [], device)
    peaks_X, best_X = best_torch(logits_XV)
    torch.testing.assert_close(found.peaks_X, peaks_X, rtol=0, atol=0, equal_nan=True)
    assert found.best_X.tolist()[:4] == best_X.tolist()[:4]
    assert torch.equal(found.tokens_X, found.best_X) and 0 <= found.best_X[4] < size


@at_most(8)
@given(st.integers(0, 2**20), st.lists(PARAMS, min_size=3, max_size=3), st.data())
def test_draws_are_the_references(
    device: torch.device, seed: int, params: list[SamplingParams], data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from([1, 20, 64, 150]))
    logits_XV = make_logits(seed, 3, size, data.draw(st.sampled_from(LOGITS_KINDS)))
    samples = [Sample(row, each, seed * row) for row, each in enumerate(params)]
    expected = [
        sample_reference(logits_XV[row].tolist(), each, index) for row, each, index in samples
    ]
    assert sample(logits_XV, samples, device) == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=5.0, top_k=2000, top_p=0.2),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.95, min_p=0.01),
    ],
    ids=str,
)
def test_draws_of_a_large_vocabulary(
    device: torch.device, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPAN", 4096)
    monkeypatch.setattr(module, "BLOCK", 2048)
    logits_XV = make_logits(3, 4, 5001)
    samples = [Sample(row, replace(params, seed=2**64 - 1 - row), row) for row in range(4)]
    found = sample(logits_XV, samples, device)
    assert found == sample_torch(logits_XV, samples)
    assert len(set(found)) > 1


def test_a_winner_outside_top_p_gives_way_more_than_once(device: torch.device) -> None:
    """A flat row, of which the run holds a tenth."""
    params = SamplingParams(temperature=1.0, top_p=0.1)
    logits_XV = (-1e-3 * torch.arange(100.0)).expand(6, 100)
    samples = repeated(params, 6)
    expected = sample_torch(logits_XV, samples)
    assert sample(logits_XV, samples, device) == expected
    assert max(expected) < 12


def test_depth_counts_from_the_roots_token(device: torch.device) -> None:
    """Nodes of one tree draw as if each were the root of its own, later one."""
    params = SamplingParams(temperature=2.0, seed=5)
    logits_XV = make_logits(1, 4, 50)
    depths = [0, 1, 1, 3]
    ints = {"dtype": torch.int32, "device": device}
    nodes = Nodes(
        torch.zeros(4, **ints),
        torch.tensor(depths, **ints),
        torch.tensor([settings_of(params, 9)], device=device),
        torch.tensor([4], **ints),
    )
    out = Sampled(torch.empty(4, device=device), torch.empty(4, **ints), torch.empty(4, **ints))
    module.sample(
        logits_XV.to(device), nodes, torch.empty(4, 1, dtype=torch.int64, device=device), out, 4
    )
    samples = [Sample(row, params, 9 + depth) for row, depth in enumerate(depths)]
    assert out.tokens_X.tolist() == sample_torch(logits_XV, samples)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_row_leaves_the_others_alone(device: torch.device, value: float) -> None:
    logits_XV = make_logits(1, 3, 20)
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=5)
    samples = [Sample(row, params, 0) for row in range(3)]
    expected = sample_torch(logits_XV, samples)
    logits_XV[1] = value
    first, broken, last = sample(logits_XV, samples, device)
    assert [first, last] == [expected[0], expected[2]]
    assert 0 <= broken < 20


def test_temperatures_from_next_to_zero_to_huge(device: torch.device) -> None:
    logits_XV = torch.zeros(8, 70)
    logits_XV[:, 20:] = -1.0
    logits_XV[6:] = make_logits(2, 2, 70)
    logits_XV[7, 3:] = -math.inf
    temperatures = [5e-324, 1e-300, 1e-40, 1e40, 1e300, 1e-6, 5e-324, 1e300]
    samples = [
        Sample(row, SamplingParams(temperature=temperature, top_p=0.7, seed=row), row)
        for row, temperature in enumerate(temperatures)
    ]
    assert sample(logits_XV, samples, device) == sample_torch(logits_XV, samples)


def test_equal_scores_go_to_the_first_in_rank(device: torch.device) -> None:
    """Beside 1e30 the noise is rounded away; the lowest of the best ids is left."""
    logits_XV = torch.tensor([[0.0, 1.0, 2.0, 2.0, 1.0, 2.0] + [2.0] * 100]).expand(6, 106)
    samples = repeated(SamplingParams(temperature=1e-30), 6)
    assert set(sample(logits_XV, samples, device)) == {2}


def test_ties_beyond_a_block(device: torch.device) -> None:
    """Equal logits, of which top_k keeps a hundred. The second half has noise rounded to units, so
    that scores are equal too."""
    logits_XV = torch.ones(16, 150)
    samples = [
        Sample(row, SamplingParams(temperature=1.0 if row < 8 else 2e-16, top_k=100), row)
        for row in range(16)
    ]
    expected = sample_torch(logits_XV, samples)
    assert sample(logits_XV, samples, device) == expected
    assert 63 < max(expected) < 100


@pytest.mark.parametrize("error", [-1e-13, 1e-13])
def test_the_border_of_top_p_is_exact(device: torch.device, error: float) -> None:
    """The first token has top_p but for a trifle; that decides about the second."""
    first, second = 0.5, 0.2
    gap = float(torch.tensor(first).double() - torch.tensor(second).double())
    params = SamplingParams(temperature=1.0, top_p=(1 + error) / (1 + math.exp(-gap)))
    logits_XV = torch.tensor([[first, second]]).expand(12, 2)
    found = sample(logits_XV, repeated(params, 12), device)
    assert set(found) == ({0, 1} if error > 0 else {0})


def test_float32_bounds_hold_no_winner_back(device: torch.device) -> None:
    """Noise in the tail of its distribution, where the bound is tight, on every token in turn."""
    seed, index = 11, 0
    uniforms = [uniform_reference(hash_reference(seed, index, token)) for token in range(300)]
    noise = torch.tensor([-math.log(-math.log(each)) for each in uniforms])
    logits_V = noise.max() - noise  # scores next to equal: the last bits decide
    logits_XV = torch.stack([logits_V + shift for shift in (0.0, 1e-6, -3.0, 100.0)])
    samples = [Sample(row, SamplingParams(temperature=1.0, seed=seed), index) for row in range(4)]
    assert sample(logits_XV, samples, device) == sample_torch(logits_XV, samples)
