"""How much of a prompt runs beside rows that decode."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorastack.engine.pace import MIN_TOKENS, MOST_STRETCH, STRETCH, Pace, stretch

DECODING = 8
seconds = st.floats(1e-4, 10.0)


def run(pace: Pace, step: float, token: float, *, steps: int = 40) -> list[tuple[int, float]]:
    """Steps of a machine whose costs are what the pace assumes: (prompt tokens, seconds)."""
    found = []
    for _ in range(steps):
        tokens = pace.budget(decoding=DECODING, waiting=1)
        found.append((tokens, step + token * tokens))
        pace.record(prompt_tokens=tokens, decoding=True, seconds=found[-1][1])
    return found


@given(seconds, seconds, st.integers(MIN_TOKENS, 4096))
def test_a_prompt_stretches_a_step_to_the_limit_and_always_goes_on(
    step: float, token: float, most: int
) -> None:
    pace = Pace(most + DECODING)
    pace.record(prompt_tokens=0, decoding=True, seconds=step)
    pace.record(prompt_tokens=most, decoding=False, seconds=step + most * token)
    for tokens, took in run(pace, step, token):
        assert MIN_TOKENS <= tokens <= most
        assert took <= max(STRETCH * step, step + MIN_TOKENS * token) * 1.001
        # One token more would be too many, or there is no more to take.
        assert tokens in (most, MIN_TOKENS) or took + token > STRETCH * step * 0.999


@given(seconds, st.floats(0.001, 0.1), st.floats(0.1, 10))
def test_it_follows_a_machine_that_changes(step: float, price: float, change: float) -> None:
    pace, token = Pace(100_000), price * step
    pace.record(prompt_tokens=0, decoding=True, seconds=step)
    run(pace, step, token)
    *_, (tokens, took) = run(pace, step, token * change)
    assert took <= 1.1 * STRETCH * step or tokens == MIN_TOKENS


def test_nothing_is_held_back_alone_or_before_anything_is_known() -> None:
    pace = Pace(300)
    assert pace.budget(decoding=1, waiting=1) == 299
    pace.record(prompt_tokens=0, decoding=True, seconds=0.01)
    pace.record(prompt_tokens=100, decoding=True, seconds=0.11)
    assert pace.budget(decoding=0, waiting=1) == 300
    assert pace.budget(decoding=1, waiting=1) == MIN_TOKENS


def test_a_few_tokens_at_a_prompts_end_say_little_about_the_price_of_one() -> None:
    pace = Pace(300)
    pace.record(prompt_tokens=0, decoding=True, seconds=0.1)
    pace.record(prompt_tokens=100, decoding=True, seconds=0.2)
    before = pace.budget(decoding=1, waiting=1)
    pace.record(prompt_tokens=1, decoding=True, seconds=0.2)
    assert pace.budget(decoding=1, waiting=1) > before / 2


@given(st.integers(1, 64), st.integers(0, 64))
def test_the_more_rows_wait_for_each_that_decodes_the_less_is_spared(
    decoding: int, waiting: int
) -> None:
    found = stretch(decoding, waiting)
    assert STRETCH <= found <= MOST_STRETCH
    assert found == STRETCH or waiting > decoding
    assert found == MOST_STRETCH or stretch(decoding, max(waiting, decoding) + 1) > found


def test_a_burst_is_read_in_larger_pieces() -> None:
    pace = Pace(4096)
    pace.record(prompt_tokens=0, decoding=True, seconds=0.01)
    pace.record(prompt_tokens=1000, decoding=False, seconds=0.11)
    pieces = [pace.budget(decoding=decoding, waiting=8 - decoding) for decoding in (7, 2, 1)]
    assert pieces == [50, 150, 200]


@given(st.integers(1, 99), st.integers(0, 99), st.integers(0, 9), st.booleans())
def test_a_step_holds_so_many_tokens_and_always_one_of_a_prompt(
    most: int, decoding: int, waiting: int, known: bool
) -> None:
    pace = Pace(most)
    if known:
        pace.record(prompt_tokens=0, decoding=True, seconds=0.01)
        pace.record(prompt_tokens=9, decoding=True, seconds=0.02)
    tokens = pace.budget(decoding=decoding, waiting=waiting)
    assert tokens >= 1
    assert tokens == 1 or tokens + decoding <= most
