"""`lorastack serve` whose rows draft in every step, whatever it costs.

    python -m benchmarks.load.fixed serve ...

A request's `max_nodes` is then the size of its trees, as far as its sources propose that many
nodes: what an adaptive size is measured against.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorastack.cli.main import main
from lorastack.config import share_cores


def all_nodes(streams: Sequence[Iterable[float]], *_: object) -> list[int]:
    """Replaces `budget.allot`: every proposed node."""
    return [sum(1 for _ in worths) for worths in streams]


def all_rows(worths: Sequence[Sequence[float]], *_: object) -> list[bool]:
    """Replaces `budget.pays`: the heads of every row."""
    return [True] * len(worths)


if __name__ == "__main__":
    share_cores()
    from lorastack.engine import speculator  # after share_cores, as it imports torch

    vars(speculator).update(allot=all_nodes, pays=all_rows)
    main()
