"""What rows on the host's path ask of the device, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorastack.kernels.heads import HeadsGroup, HeadsWeights, TopTokens
from lorastack.kernels.ops import Ops
from lorastack.kernels.sample import Sample
from lorastack.model.backends.triton.ops import TritonOps
from lorastack.request import SamplingParams

HIDDEN, VOCAB = 32, 100
SIZES = ((3, 1, False), (1, 1, True), (2, 2, True))  # heads, blocks, own outputs of groups


@pytest.fixture
def ops(device: torch.device) -> TritonOps:
    torch.manual_seed(0)
    return TritonOps(device)


@pytest.fixture
def logits_XV(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    logits_XV = torch.randn(5, VOCAB, generator=generator)
    logits_XV[2, [7, 9]] = 9.0  # a tie
    logits_XV[4, 3] = torch.nan
    return logits_XV.to(device)


def groups(device: torch.device) -> list[HeadsGroup]:
    """The second is empty."""
    made = []
    for (heads, blocks, own), (start, end) in zip(SIZES, ((0, 2), (2, 2), (2, 3)), strict=True):
        ids_N = None if own else torch.arange(0, 40, 2, device=device)
        output = torch.randn(*((heads,) if own else ()), 20, HIDDEN, device=device)
        weight = 0.2 * torch.randn(blocks, heads, HIDDEN, HIDDEN, device=device)
        bias = torch.randn(blocks, heads, HIDDEN, device=device)
        made.append(HeadsGroup(start, end, HeadsWeights(weight, bias, output, ids_N)))
    return made


def assert_close(found: TopTokens, expected: TopTokens) -> None:
    assert torch.equal(found.ids_XR, expected.ids_XR)
    torch.testing.assert_close(
        found.logprobs_XR, expected.logprobs_XR, atol=1e-4, rtol=0, equal_nan=True
    )


def test_best_and_top(ops: TritonOps, logits_XV: Tensor) -> None:
    peaks_X, best_X = ops.best(logits_XV)
    expected = logits_XV.max(dim=-1)
    assert torch.equal(best_X, expected.indices) and best_X.dtype == torch.int64
    torch.testing.assert_close(peaks_X, expected.values, rtol=0, atol=0, equal_nan=True)
    assert_close(ops.top(logits_XV, 5), Ops().top(logits_XV, 5))
    assert ops.top(logits_XV[:0], 5).ids_XR.shape == (0, 5)


def test_samples_in_any_order_with_typical_ones_between(ops: TritonOps, logits_XV: Tensor) -> None:
    samples = [
        Sample(0, SamplingParams(temperature=0.8, seed=1), 0),
        Sample(1, SamplingParams(temperature=0.8, seed=2, typical_p=0.5), 1),
        Sample(3, SamplingParams(), 2),
        Sample(3, SamplingParams(temperature=1.2, seed=3, top_k=5), 3),
        Sample(2, SamplingParams(temperature=0.9, seed=4, top_p=0.7, min_p=0.01), 4),
        Sample(3, SamplingParams(temperature=1.2, seed=5), 5),
    ]
    best_X = logits_XV.argmax(-1).tolist()
    assert ops.sample(logits_XV, best_X, samples) == Ops().sample(logits_XV, best_X, samples)


def test_heads(ops: TritonOps, device: torch.device) -> None:
    hidden_BH, made = torch.randn(3, HIDDEN, device=device), groups(device)
    torch.testing.assert_close(ops.states(hidden_BH, made), Ops().states(hidden_BH, made))
    assert_close(ops.propose(hidden_BH, made, 4), Ops().propose(hidden_BH, made, 4))
