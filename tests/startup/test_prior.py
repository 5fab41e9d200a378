"""What heads may say of how often they are right, before trees start from it."""

from __future__ import annotations

import pytest

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.speculation.calibration import Calibration
from lorastack.startup.prior import check_acceptance


def known(num_heads: int) -> str:
    calibration = Calibration()
    for head in range(num_heads):
        calibration.record(head, -0.5, accepted=True)
    return calibration.to_json()


def test_a_calibration_of_as_many_heads_passes() -> None:
    check_acceptance(known(3), 3)
    check_acceptance(known(2), 3)
    check_acceptance(Calibration().to_json(), 1)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (known(4), "knows 4 heads, the folder has 3"),
        ("{}", "no calibration of this version"),
        ('{"version": 99}', "no calibration of this version"),
        (known(2).replace("worths", "worth"), "a field is missing"),
        (known(2).replace("[[", "[[[", 1), "no calibration of this version"),
    ],
)
def test_what_trees_cannot_start_from_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(InvalidArgumentError, match=wrong) as refusal:
        check_acceptance(text, 3)
    assert refusal.value.reason is Reason.INVALID_ADAPTER
    assert "train eval" in refusal.value.message
