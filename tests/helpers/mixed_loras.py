"""LoRAs of mixed ranks and targets, and stacks of them, for rows that stand side by side."""

from __future__ import annotations

from typing import Any

from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD
from tests.helpers.native import Uses

LORAS: dict[str, dict[str, Any]] = {
    "all": {"rank": 5, "targets": (*LAYER_TARGETS, LM_HEAD, EMBED)},
    "some": {"rank": 19, "targets": ("k_proj", "up_proj", "down_proj"), "seed": 2},
    "wide": {"rank": 33, "targets": ("q_proj", "o_proj", "gate_proj"), "seed": 3},
}
ALL, SOME, WIDE = range(len(LORAS))  # their places
STACKS: tuple[Uses, ...] = ((), ((ALL, 1.0),), ((SOME, 1.0),), ((ALL, 0.5), (WIDE, 1.5)))
