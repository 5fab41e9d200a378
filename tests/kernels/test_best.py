import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.kernels.best import best, best_reference


@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(0, 2**20),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_torch_with_ties_and_infinities(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-torch.inf, -1.0, 0.0, 2.0, 2.5])
    picked = torch.randint(len(levels), (rows, columns), generator=generator)
    logits_XV = levels.to(dtype)[picked]
    values_X, ids_X = best(logits_XV)
    expected_X, expected_ids_X = best_reference(logits_XV)
    assert torch.equal(values_X, expected_X)
    assert torch.equal(ids_X, expected_ids_X)


@given(st.integers(0, 99))
def test_a_row_with_nan_says_so(place: int) -> None:
    logits_XV = torch.zeros(3, 100)
    logits_XV[1, place] = torch.nan
    values_X, _ = best(logits_XV)
    assert values_X.isnan().tolist() == [False, True, False]
