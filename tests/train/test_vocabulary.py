"""Which tokens are chosen, and how much they cover; written files are what adapters may bring."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.train.vocabulary import (
    choose_vocabulary,
    coverage,
    load_vocabulary,
    save_vocabulary,
)
from tests.adapters.folders import parse_folder
from tests.helpers.adapters import write_heads
from tests.helpers.tiny import VOCAB_SIZE, build_llama, shapes_of


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(1, 10))
def test_no_other_choice_covers_more(tokens: list[int], size: int) -> None:
    vocabulary = choose_vocabulary(tokens, size, 10)
    assert vocabulary == sorted(set(vocabulary)) and len(vocabulary) == size
    best = sum(count for _, count in Counter(tokens).most_common(size))
    assert coverage(vocabulary, tokens) == pytest.approx(best / len(tokens))


def test_tokens_that_never_came_join_by_id() -> None:
    tokens = [7, 5, 7, 9, 9, 5]
    assert choose_vocabulary(tokens, 2, 10) == [5, 7]
    assert choose_vocabulary(tokens, 5, 10) == [0, 1, 5, 7, 9]
    assert coverage([5, 7], tokens) == pytest.approx(4 / 6)


def test_a_written_vocabulary_is_read_by_the_server(tmp_path: Path) -> None:
    folder = write_heads(tmp_path / "heads", 64)
    assert load_vocabulary(folder) is None
    vocabulary = [*range(0, 140, 2), VOCAB_SIZE - 1]
    save_vocabulary(folder, vocabulary)
    found = load_vocabulary(folder)
    assert found is not None and found.tolist() == vocabulary
    shapes = shapes_of(build_llama(tmp_path / "model"))
    assert parse_folder(folder, shapes).draft_vocabulary == tuple(vocabulary)
