from hypothesis import given
from hypothesis import strategies as st

from lorastack.speculation.lookup import LONGEST, MATCH_CAP, SHORTEST, Lookup

texts = st.lists(st.integers(0, 3), max_size=60)


def search(tokens: list[int], limit: int) -> tuple[int, tuple[int, ...]]:
    """What `find` promises, by looking everywhere."""
    end = len(tokens)
    for length in range(LONGEST, SHORTEST - 1, -1):
        for start in range(end - 1, length - 1, -1):
            if tokens[start - length : start] == tokens[end - length :]:
                match = length
                while (
                    match < min(start, MATCH_CAP)
                    and tokens[start - match - 1] == tokens[end - match - 1]
                ):
                    match += 1
                return match, tuple(tokens[start : start + limit])
    return 0, ()


@given(texts, st.integers(1, 8))
def test_it_finds_what_a_search_finds(tokens: list[int], limit: int) -> None:
    assert Lookup(tokens).find(limit) == search(tokens, limit)


@given(texts, texts)
def test_pushed_tokens_are_as_good_as_given_ones(given_first: list[int], pushed: list[int]) -> None:
    lookup = Lookup(given_first)
    for token in pushed:
        lookup.push(token)
        lookup.find(4)
    assert lookup.find(4) == Lookup(given_first + pushed).find(4)


def test_the_latest_occurrence_of_the_longest_match_wins() -> None:
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 4, 8, 3, 4, 7, 1, 2, 3, 4]).find(2) == (4, (9, 2))
    assert Lookup([1, 2, 5, 6, 1, 2, 7, 8, 1, 2]).find(3) == (2, (7, 8, 1))


def test_a_loop_goes_on_with_what_is_there() -> None:
    assert Lookup([5] * 30).find(8) == (MATCH_CAP, (5,))
    assert Lookup([1, 2] * 4).find(8) == (6, (1, 2))


def test_too_little_text_goes_on_nowhere() -> None:
    assert Lookup().find(4) == (0, ())
    assert Lookup([1, 2]).find(4) == (0, ())
