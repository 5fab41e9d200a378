import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.speculation.calibration import NUM_WORTHS, Calibration
from lorastack.speculation.proposal import Proposal

logprobs = st.floats(-40.0, 0.0)


def chance(calibration: Calibration, head: int, logprob: float) -> float:
    return calibration.probabilities(head, (logprob,))[0]


def test_unseen_heads_are_trusted_a_little_less_than_they_trust_themselves() -> None:
    fresh = Calibration()
    assert chance(fresh, 0, math.log(0.5)) == pytest.approx(0.45)
    assert chance(fresh, 7, math.log(0.01)) == pytest.approx(0.009)


@given(st.lists(st.tuples(st.integers(0, 99), logprobs, st.booleans()), max_size=60), logprobs)
def test_whatever_was_recorded_chances_stay_chances(
    seen: list[tuple[int, float, bool]], logprob: float
) -> None:
    calibration = Calibration()
    for head, log, accepted in seen:
        calibration.record(head, log, accepted)
    for head in (0, 3, 99):
        assert 0.0 <= chance(calibration, head, logprob) < 1.0


@pytest.mark.parametrize("truth", [0.1, 0.5, 1.0])
def test_it_converges_to_what_is_accepted_and_follows_a_change(truth: float) -> None:
    rng = random.Random(0)
    calibration = Calibration()
    for factor in (truth, 0.7):
        for _ in range(30_000):
            own = rng.choice([0.05, 0.2, 0.6])
            calibration.record(1, math.log(own), rng.random() < own * factor)
        for own in (0.05, 0.2, 0.6):
            found = chance(calibration, 1, math.log(own))
            assert found == pytest.approx(own * factor, rel=0.3, abs=0.003)
    assert chance(calibration, 0, math.log(0.5)) == pytest.approx(0.45)  # another head


def test_likely_candidates_say_nothing_of_unlikely_ones() -> None:
    calibration = Calibration()
    for _ in range(1000):
        calibration.record(0, math.log(0.9), accepted=True)
        calibration.record(0, math.log(0.2), accepted=False)
    assert chance(calibration, 0, -0.001) == 0.99  # never quite sure
    assert chance(calibration, 0, math.log(0.2)) < 0.02
    assert chance(calibration, 0, math.log(0.05)) == pytest.approx(0.045)


def test_a_proposal_teaches_each_head_up_to_the_last_sample() -> None:
    calibration, single = Calibration(), Calibration()
    ids = ((5, 6), (7, 8), (9, 9))
    logs = ((-0.5, -1.5), (-0.7, -2.0), (-0.1, -3.0))
    calibration.record_proposal(Proposal(ids, logs), sampled=(5, 4))
    for head, log, accepted in ((0, -0.5, 1), (0, -1.5, 0), (1, -0.7, 0), (1, -2.0, 0)):
        single.record(head, log, bool(accepted))
    assert calibration.to_json() == single.to_json()


def test_prompt_lookup_is_learnt_by_match_and_depth() -> None:
    calibration = Calibration()
    before = calibration.lookup_probability(4, 0)
    for _ in range(2000):
        calibration.record_lookup(2, (5, 6), sampled=(7, 6))
        calibration.record_lookup(16, range(8), sampled=range(9))
    assert calibration.lookup_probability(2, 0) < 0.02
    assert 0.95 < calibration.lookup_probability(16, 3) < 1.0
    assert calibration.lookup_probability(2, 1) == Calibration().lookup_probability(2, 1)
    assert calibration.lookup_probability(4, 0) == before


def test_mean_worths_forget_slowly() -> None:
    calibration = Calibration()
    assert calibration.mean_worths == (0.0,) * NUM_WORTHS
    calibration.record_worths([0.8, 0.4])
    assert calibration.mean_worths[:3] == pytest.approx((0.8, 0.4, 0.0))
    for _ in range(300):
        calibration.record_worths([0.2, 0.1, 0.05])
    assert calibration.mean_worths[:3] == pytest.approx((0.2, 0.1, 0.05), abs=0.01)


@given(st.lists(st.lists(st.floats(0, 1), max_size=20), max_size=8))
def test_mean_worths_never_rise_along_a_draft(drafts: list[list[float]]) -> None:
    calibration = Calibration()
    for draft in drafts:
        calibration.record_worths(sorted(draft, reverse=True))
    worths = list(calibration.mean_worths)
    assert worths == sorted(worths, reverse=True)


@given(st.lists(st.tuples(st.integers(0, 5), logprobs, st.booleans()), max_size=30))
def test_it_survives_storage(seen: list[tuple[int, float, bool]]) -> None:
    calibration = Calibration()
    for head, log, accepted in seen:
        calibration.record(head, log, accepted)
        calibration.record_lookup(2 + head, (head,), (head if accepted else -1,))
        calibration.record_worths([0.5] * head)
    restored = Calibration.from_json(calibration.to_json())
    assert restored.to_json() == calibration.to_json()
    for head, log, _ in seen:
        assert chance(restored, head, log) == chance(calibration, head, log)


def test_a_copy_stays_as_it_was() -> None:
    calibration = Calibration.from_json(_used())
    calibration.record_lookup(2, (5,), (5,))
    calibration.record_worths([0.5])
    copy, before = calibration.copy(), calibration.to_json()
    assert copy.to_json() == before
    calibration.record_proposal(Proposal(((1,), (2,)), ((-0.3,), (-0.6,))), (1, 3))
    calibration.record_lookup(2, (5,), (6,))
    calibration.record_worths([0.1])
    assert copy.to_json() == before != calibration.to_json()


def test_storage_is_bounded() -> None:
    calibration = Calibration()
    for head in range(5000):
        calibration.record(head, -1.0 / 3, accepted=True)
    assert len(calibration.to_json()) < 50_000


def _used() -> str:
    calibration = Calibration()
    calibration.record_proposal(Proposal(((1,), (2,)), ((-0.3,), (-0.6,))), (1, 3))
    return calibration.to_json()


@given(st.data())
def test_cut_or_flipped_bytes_never_raise(data: st.DataObject) -> None:
    text = _used()
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.text(max_size=2)) + text[at + data.draw(st.integers(0, 9)) :]
    found = Calibration.from_json(damaged)
    assert 0.0 <= chance(found, 0, -0.5) < 1.0
    assert 0.0 <= found.lookup_probability(3, 1) < 1.0
    assert len(found.mean_worths) == NUM_WORTHS


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"heads": [[[1.0], [1.0]]]},
        {"heads": [[[-1.0] * 8, [8.0] * 8]]},
        {"heads": [[[float("nan")] * 8, [8.0] * 8]]},
        {"heads": [[["x"] * 8, [8.0] * 8]]},
        {"heads": [[[1.0] * 8, [0.0] * 8]]},
        {"heads": 3},
        {"lookup": []},
        {"worths": [[2.0, 1.0]] * NUM_WORTHS},
        {"worths": []},
    ],
)
def test_damaged_states_give_a_fresh_one(change: dict[str, object]) -> None:
    state = json.loads(_used())
    fresh = Calibration().to_json()
    assert Calibration.from_json(json.dumps(state)).to_json() != fresh
    assert Calibration.from_json(json.dumps(state | change)).to_json() == fresh
    with pytest.raises(ValueError, match=r"\w"):
        Calibration.parse(json.dumps(state | change))
    for key in change:
        del state[key]
    assert Calibration.from_json(json.dumps(state)).to_json() == fresh
