"""The host cache: bytes, order of use, failures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.errors import DataLossError
from lorastack.layout import AdapterLayout


def packed(digest: str, nbytes: int) -> PackedAdapter:
    layout = AdapterLayout(slots={}, scales={}, num_elements=nbytes, itemsize=1, num_heads=0)
    return PackedAdapter(
        digest=digest,
        buffer=torch.zeros(nbytes, dtype=torch.uint8),
        layout=layout,
        pinned=True,
    )


SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 9}


@given(budget=st.integers(0, 12), asked=st.lists(st.sampled_from(sorted(SIZES)), max_size=30))
def test_against_a_plain_lru(budget: int, asked: list[str]) -> None:
    loads: list[str] = []

    def load(digest: str) -> PackedAdapter:
        loads.append(digest)
        return packed(digest, SIZES[digest])

    cache = HostCache(budget, load)
    model: list[str] = []  # oldest use first
    expected_loads: list[str] = []
    for digest in asked:
        if digest not in model:
            expected_loads.append(digest)
            if SIZES[digest] <= budget:
                while sum(SIZES[kept] for kept in model) + SIZES[digest] > budget:
                    model.pop(0)
                model.append(digest)
        else:
            model.remove(digest)
            model.append(digest)
        assert cache.get(digest).digest == digest
        assert list(cache.snapshot().items()) == [(kept, SIZES[kept]) for kept in model]
        assert sum(cache.snapshot().values()) <= budget
    assert loads == expected_loads


def test_failures_are_not_kept() -> None:
    answers: list[PackedAdapter | Exception] = [DataLossError("gone"), packed("a", 1)]

    def load(digest: str) -> PackedAdapter:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cache = HostCache(10, load)
    with pytest.raises(DataLossError):
        cache.get("a")
    assert cache.snapshot() == {}
    assert cache.get("a").digest == "a"


def test_the_oldest_can_be_dropped() -> None:
    cache = HostCache(3, lambda digest: packed(digest, 1))
    for digest in "abca":
        cache.get(digest)
    assert cache.drop_oldest()
    assert cache.snapshot() == {"c": 1, "a": 1}
    assert cache.drop_oldest() and cache.drop_oldest() and not cache.drop_oldest()
    cache.get("b")
    assert cache.snapshot() == {"b": 1}


def test_a_dropped_copy_makes_room() -> None:
    cache = HostCache(3, lambda digest: packed(digest, 1))
    for digest in "abc":
        cache.get(digest)
    cache.drop("b")
    cache.drop("nobody")
    cache.get("d")
    assert set(cache.snapshot()) == {"a", "c", "d"}
    assert (cache.num_hits, cache.num_misses) == (0, 4)
