"""In which order waiting rows may start. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lorastack.engine.row import Row

OVERDUE = 5.0  # seconds from submission: from then on only older rows go before
LOOK_AHEAD = 64  # rows for which adapters are loaded


def is_overdue(row: Row, now: float) -> bool:
    """Whether a row has waited so long that a slot is kept for it."""
    return now - row.submitted >= OVERDUE


def admission_order(waiting: Sequence[Row], running: Iterable[Row], now: float) -> list[Row]:
    """First rows that have run before or are overdue, as they stand in the queue.

    Then those whose stack of LoRAs has the fewest rows, running or before them here: stacks take
    turns, and one that floods the queue delays its own rows only. Equal ones as they stand.
    """
    num_rows = Counter(row.lora_digests for row in running)
    ranks: dict[Row, int] = {}
    for row in waiting:
        if row.admitted is not None or is_overdue(row, now):
            ranks[row] = -1
        else:
            ranks[row] = num_rows[row.lora_digests]
            num_rows[row.lora_digests] += 1
    return sorted(waiting, key=ranks.__getitem__)
