"""Saves what was learnt about heads, in processes that are killed. It imports little."""

from __future__ import annotations

import itertools
from pathlib import Path

from lorastack.adapters.store.learned import Learned

DIGESTS = tuple(f"sha256:{n:064x}" for n in range(20))


def states(turn: int) -> dict[str, str]:
    """Those of that turn; every tenth is the same."""
    return {digest: str(turn % 10) * 40_000 for digest in DIGESTS}


def is_ours(digest: str) -> bool:
    return digest in DIGESTS


def save_for_ever(root: Path) -> None:
    learned = Learned(root, is_ours)
    for turn in itertools.count():
        learned.save(states(turn))
