"""Steps that are captured once and replayed: hundreds of launches for the host's price of one.

A key says all that launches depend on beside the numbers in device memory, so a step of the same
key is the same launches. Capturing costs some ten steps, so a key is captured at its third use.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable

from lorastack.model.backends.triton.device import Device, Replay

CAPTURED_AT = 3  # uses
MAX_GRAPHS = 64  # of buckets and kinds of LoRAs: hardly ever are there more, and memory is counted

log = logging.getLogger(__name__)


class Graphs:
    """The graphs of one device, by key. What they read and write must stay where it is."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._replays: dict[Hashable, Replay] = {}
        self._uses: Counter[Hashable] = Counter()
        self._failed: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Enqueues what `launch` does, by replaying it from the third time on."""
        self._uses[key] += 1
        if self._uses[key] >= CAPTURED_AT:
            self.capture(key, launch)
        replay = self._replays.get(key)
        if replay is None:
            launch()
        else:
            replay()

    def capture(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Captures `launch`, which has run before, unless that was tried already.

        If it fails, or there are MAX_GRAPHS, steps of this key are launched kernel by kernel as
        before.
        """
        known = key in self._replays or key in self._failed
        if not self._device.captures or known or len(self._replays) >= MAX_GRAPHS:
            return
        try:
            self._replays[key] = self._device.capture(launch)
        except Exception as error:
            self._failed.add(key)
            log.warning("steps %s run without a graph, which is slower", key, exc_info=error)
