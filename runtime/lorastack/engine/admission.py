"""The order in which waiting rows may start. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf

from lorastack.engine.row import Row

PATIENCE = 0.5  # seconds of waiting that outweigh one row of the same stack
OVERDUE = 5.0  # seconds since submission; then a slot is kept for a row whose LoRAs load
LOOK_AHEAD = 64  # waiting rows whose adapters are loaded ahead


def is_overdue(row: Row, now: float) -> bool:
    """True if the row has waited so long that a slot is kept for it."""
    return now - row.submitted >= OVERDUE


def admission_order(waiting: Sequence[Row], running: Iterable[Row], now: float) -> list[Row]:
    """Rows that have run before, as they stand in the queue; then the others by rank.

    A row's rank is the number of rows of its stack of LoRAs that run or stand before it, less its
    age in units of PATIENCE. So stacks take turns, and one that floods the queue delays its own
    rows only; yet nobody starves: what is submitted (number of rows) * PATIENCE later than a row
    never goes before it.
    """
    num_rows = Counter(row.lora_digests for row in running)
    ranks: dict[Row, float] = {}
    for row in waiting:
        if row.admitted is not None:
            ranks[row] = -inf
        else:
            ranks[row] = num_rows[row.lora_digests] - (now - row.submitted) / PATIENCE
            num_rows[row.lora_digests] += 1
    return sorted(waiting, key=ranks.__getitem__)
