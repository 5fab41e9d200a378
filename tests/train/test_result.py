"""What a run makes of what was learnt."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorastack.errors import InvalidArgumentError
from lorastack.train.result import read_served


@pytest.mark.parametrize("data", ["{", "[]", "{}", "null"])
def test_a_damaged_measurement_is_named(data: str, tmp_path: Path) -> None:
    assert read_served(tmp_path) == (None, None)
    (tmp_path / "served.json").write_text(data)
    with pytest.raises(InvalidArgumentError, match=r"served\.json is damaged: delete it"):
        read_served(tmp_path)
