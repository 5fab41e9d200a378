"""Who has to make room on the device for whom, and when. Pure: no clock, no tensor, no thread.

An adapter that running rows need leaves for others only after its turn of QUANTUM seconds. A turn
begins when the adapter arrives, and again when a set that had to wait for its members gets them.
Nobody loses anything for heads or for what is loaded ahead: these only take room that is free or
that nobody uses.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import IntEnum
from math import inf

from lorastack.adapters.memory.device import DeviceAdapter

QUANTUM = 0.2  # seconds


class Use(IntEnum):
    """Who needed an adapter in the last step. Those of a lower use leave first."""

    IDLE = 0
    SOFT = 1  # heads, which rows can do without, and what waiting rows will need
    HARD = 2  # LoRAs of running rows


@dataclass(slots=True)
class Resident:
    """An adapter on the device. since: when its turn began. pins: how often running rows pin it."""

    adapter: DeviceAdapter
    since: float
    use: Use = Use.SOFT
    pins: int = 0


def choose_victims(
    residents: Iterable[Resident],
    excess: int,
    *,
    use: Use,
    keep: Container[str],
    began_before: float = -inf,
) -> list[str] | None:
    """Digests whose leaving makes room for `excess` bytes; None if all that may go are too few.

    residents: least recently used first. use: what the room is for; only adapters of a lower use
    may go for it, and those whose turn began at `began_before` or earlier. keep: digests that stay.
    The idle go first, then the soft, both in their order; then those in use, the oldest turn first.
    """
    able = [
        each
        for each in residents
        if (each.use < use or each.since <= began_before)
        and not each.pins
        and each.adapter.digest not in keep
    ]
    able.sort(key=lambda each: (each.use, each.since if each.use is Use.HARD else 0.0))
    victims: list[str] = []
    for each in able:
        if excess <= 0:
            break
        victims.append(each.adapter.digest)
        excess -= each.adapter.nbytes
    return victims if excess <= 0 else None
