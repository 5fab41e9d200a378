import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.kernels.gumbel import _TOKEN_STEP, _mix, gumbel, hash_reference, uniform_reference

seeds = st.integers(-(2**63), 2**64 - 1)


@settings(deadline=None)
@given(seeds, st.integers(0, 2**31), st.lists(st.integers(0, 2**31), min_size=1, max_size=8))
def test_noise_equals_plain_integers(seed: int, index: int, ids: list[int]) -> None:
    expected = [
        -math.log(-math.log(uniform_reference(hash_reference(seed, index, token)))) for token in ids
    ]
    noise = gumbel(seed, index, torch.tensor(ids))
    assert noise.dtype == torch.float64
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64))


def test_splitmix64_gives_its_published_numbers() -> None:
    """A stream that starts at 0 is splitmix64 of seed 0, whose first outputs are well known."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mix(n * _TOKEN_STEP) for n in (1, 2, 3)] == known


def test_the_extreme_hashes_stay_finite() -> None:
    for bits in (0, 2**64 - 1):
        uniform = uniform_reference(bits)
        assert 0.0 < uniform < 1.0
        assert math.isfinite(-math.log(-math.log(uniform)))


@settings(deadline=None)
@given(seeds)
def test_seed_index_and_token_each_matter(seed: int) -> None:
    ids = torch.arange(64)
    streams = [gumbel(seed, 0, ids), gumbel(seed, 1, ids), gumbel(seed + 1, 0, ids)]
    values = torch.cat(streams).tolist()
    assert len(set(values)) == len(values)


def test_noise_has_the_gumbel_distribution() -> None:
    """Mean 0.5772, variance pi^2 / 6; neighbours in token id, index and seed are uncorrelated."""
    ids = torch.arange(500)
    by_seed = torch.stack(
        [torch.stack([gumbel(seed, index, ids) for index in range(20)]) for seed in range(20)]
    )
    count = by_seed.numel()
    centred = (by_seed - by_seed.mean()) / by_seed.std()
    assert abs(float(by_seed.mean()) - 0.57722) < 4 * math.sqrt(math.pi**2 / 6 / count)
    assert abs(float(by_seed.var()) - math.pi**2 / 6) < 0.05
    for axis in range(3):
        length = by_seed.shape[axis] - 1
        pairs = centred.narrow(axis, 0, length) * centred.narrow(axis, 1, length)
        assert abs(float(pairs.mean())) < 4 / math.sqrt(pairs.numel())
