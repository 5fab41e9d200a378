"""What the pool says of itself to other threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """One adapter on the device. in_use: pins of the rows of this step. pinned: by `pin`."""

    digest: str
    nbytes: int
    in_use: int
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What the pool holds, and counts since it was made.

    adapters: least recently used first. last_used: digest -> time.time() seconds, of any that was
    ever used and not dropped. num_waiting: sets of LoRAs that rows wait for. host_hits, disk_loads:
    loads by where the bytes were. load_seconds: total run time of loads and copies.
    """

    adapters: tuple[AdapterStats, ...]
    last_used: Mapping[str, float]
    num_waiting: int
    host_hits: int
    disk_loads: int
    load_seconds: float
    evictions: int
