"""Weights in huge pages."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.kernels.native.memory import BLOCK, HugePages
from lorastack.layout import ALIGNMENT

DTYPES = (torch.bfloat16, torch.float32)


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 70), st.sampled_from(DTYPES))))
def test_copies_are_equal_aligned_and_apart(
    shapes: list[tuple[int, int, torch.dtype]],
) -> None:
    pages = HugePages()
    sources = [torch.randn(a, b).to(dtype).T for a, b, dtype in shapes]
    copies = [pages.copy(source) for source in sources]
    del pages  # they keep their memory
    for source, copy in zip(sources, copies, strict=True):
        assert torch.equal(source, copy) and copy.dtype == source.dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % ALIGNMENT == 0 or not copy.numel()


def test_more_than_a_block() -> None:
    pages = HugePages()
    small = pages.copy(torch.ones(3))
    large = pages.copy(torch.arange(BLOCK // 4 + 5, dtype=torch.int32))
    assert small.tolist() == [1, 1, 1]
    assert large[-1] == BLOCK // 4 + 4
