"""Device copies of adapters: loaded beside the step loop, pinned by running rows, paged by turns.

The step thread calls `poll`, then `acquire`, `try_acquire` and `prefetch` for its rows, and
`release`; it never waits. A thread of low priority loads adapters to the host, and the device
copies them while it computes (`pipeline`); `poll` takes in what is finished. On a CPU the host copy
itself serves as the device copy, so nothing is stored twice.

LoRAs that are missing. `acquire` is all or nothing. A set of LoRAs that is not there whole queues
in the order of first asking, and stays in the queue while its rows keep asking. The first set whose
members are all on the host is placed first: room for all its missing members at once, taken as
`turns` says. Those behind it get nothing before it has its room. What was placed stays until the
set is acquired or nobody asks any more. Then its turn begins.

Heads never make a row wait. A private part and the heads that it corrects come as a set too, both
or neither, since half of it serves nobody.

How long a set waits: its own load, then, for each set before it in the queue and once for itself,
at most QUANTUM, its copies and a step; and MAX_AHEAD copies once. Sets whose room is idle need
no turn, and several may advance in one. One that still loads lets those behind it go ahead.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf
from threading import Lock

from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.device import DeviceAdapter, MakeViews, no_views
from lorastack.adapters.memory.host import HostCache
from lorastack.adapters.memory.pipeline import Others, Pipeline
from lorastack.adapters.memory.stats import AdapterStats, PoolStats
from lorastack.adapters.memory.turns import QUANTUM, Resident, Use, choose_victims
from lorastack.errors import (
    FailedPreconditionError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
)

MAX_AHEAD = 2  # loads, and copies, under way at once for rows that do not need them yet


@dataclass(slots=True)
class _Ask:
    """A set in the queue. placed: its room is taken, and nothing of it may go."""

    asked: bool = True  # since the last poll
    placed: bool = False


class DevicePool:
    """Adapters on one device under a budget of bytes. For the step thread, `stats` for any."""

    def __init__(
        self,
        budget: int,
        host: HostCache,
        on_loaded: Callable[[], None] = lambda: None,
        *,
        copies: Copies | None = None,
        others: Others | None = None,
        idle: Callable[[], bool] | None = None,
        make_views: MakeViews = no_views,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """budget: bytes. on_loaded: called from a loader thread when `poll` has something to take.

        copies: into an arena of `budget` bytes; None if host copies serve. others, idle,
        make_views: see `Pipeline`. clock: seconds.
        """
        self.blocked = False  # a set waits for the turns of rows that run: poll after the next step
        self._budget = budget
        self._host = host
        self._pipeline = Pipeline(host, copies, on_loaded, idle, others, make_views)
        self._clock = clock
        self._lock = Lock()  # guards what `stats` reads
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # oldest use first
        self._pinned: dict[str, frozenset[str]] = {}  # by `pin`: digest -> what stays for it
        self._last_used: dict[str, float] = {}
        self._evictions = 0
        self._queue: dict[frozenset[str], _Ask] = {}  # in order of first ask
        # Asked for since the last poll by whoever can do without: each set whole or not at all.
        self._soft: dict[frozenset[str], None] = {}

    # -- for rows ---------------------------------------------------------------------------------

    def acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        """Pins all of them; else pins none, returns None and queues: ask again after each `poll`.

        A digest that is named twice is pinned twice. Raises the LorastackError that a load ended
        with; FailedPreconditionError ADAPTER_TOO_LARGE if they cannot fit together, and
        ResourceExhaustedError DEVICE_MEMORY_PINNED if they cannot beside what `pin` holds.
        """
        wanted = frozenset(digests)
        self._pipeline.raise_failure(wanted)
        if self.holds(wanted):
            ask = self._queue.pop(wanted, None)
            if ask is not None and ask.placed:
                now = self._clock()
                for digest in wanted:
                    self._residents[digest].since = now
            return tuple(self._pin(digest, Use.HARD) for digest in digests)
        if error := self._misfit(wanted):
            raise error
        self._queue.setdefault(wanted, _Ask()).asked = True
        for digest in dict.fromkeys(digests):
            if digest in self._residents:
                self._touch(digest, Use.SOFT)
            elif not self._pipeline.has(digest):
                self._pipeline.load(digest)
        return None

    def try_acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        """Pins heads, all of these, if they are there; else none, and they come when there is room
        to spare for all.

        Raises the LorastackError that a load ended with; FailedPreconditionError ADAPTER_TOO_LARGE.
        """
        wanted = frozenset(digests)
        self._pipeline.raise_failure(wanted)
        if self.holds(wanted):
            return tuple(self._pin(digest, Use.SOFT) for digest in digests)
        if sum(map(self._size, wanted)) > self._budget:
            raise self._too_large(wanted)
        self.prefetch(digests, together=True)
        return None

    def prefetch(self, digests: Collection[str], *, together: bool = False) -> None:
        """Says what a row will need. Loads a few at a time, and no more than could be placed.

        together: they are of use together only. Those of them that are on the device keep their
        room only if the others have theirs: half a set must not hold up another.
        """
        coming = self._pipeline.copying
        whole = all(digest in self._residents or digest in coming for digest in digests)
        self._soft.update(
            {frozenset(digests): None} if together else {frozenset((d,)): None for d in digests}
        )
        for digest in digests:
            if digest in self._residents:
                if whole or not together:
                    self._touch(digest, Use.SOFT)
            elif not self._pipeline.has(digest) and self._may_load_ahead():
                self._pipeline.load(digest)

    def holds(self, digests: Collection[str]) -> bool:
        """True if all of them are on the device."""
        return all(digest in self._residents for digest in digests)

    def release(self, digests: Sequence[str]) -> None:
        """Gives back what `acquire` and `try_acquire` pinned."""
        for digest in digests:
            resident = self._residents[digest]
            assert resident.pins > 0, digest
            resident.pins -= 1

    # -- for operators ----------------------------------------------------------------------------

    def pin(self, digest: str, needs: Collection[str] = ()) -> None:
        """Keeps an adapter that is on the device there until `unpin` or `drop`.

        needs: what stays there with it, heads that it corrects.
        """
        kept = frozenset((digest, *needs))
        assert self.holds(kept), digest
        with self._lock:
            self._pinned[digest] = kept

    def unpin(self, digest: str) -> None:
        """Ends what `pin` began; nothing happens without it."""
        with self._lock:
            self._pinned.pop(digest, None)

    @property
    def _kept(self) -> frozenset[str]:
        """What stays on the device for some `pin`."""
        return frozenset[str]().union(*self._pinned.values())

    def drop(self, digest: str) -> bool:
        """Lets go of all copies; False while a load is under way. No row may have it pinned."""
        if not self._pipeline.drop(digest):
            return False
        self.unpin(digest)
        self._queue = {wanted: ask for wanted, ask in self._queue.items() if digest not in wanted}
        with self._lock:
            self._last_used.pop(digest, None)
            resident = self._residents.pop(digest, None)
        if resident is not None:
            assert not resident.pins, digest
            self._pipeline.release(digest)
        return True

    # -- once a step ------------------------------------------------------------------------------

    @property
    def copying(self) -> bool:
        """True while a copy is under way, of whose end only `poll` tells."""
        return bool(self._pipeline.copying)

    def poll(self) -> bool:
        """Takes in what was loaded, makes room for those that wait; True if anything changed."""
        now = self._clock()
        changed, arrived = self._pipeline.take_finished()
        for adapter in arrived:
            self._take_in(adapter, now)
        self._queue = {wanted: ask for wanted, ask in self._queue.items() if ask.asked}
        self._pipeline.keep_only(set[str]().union(*self._soft, *self._queue))
        changed |= self._place_all(now)
        for adapter in self._pipeline.advance(set[str]().union(*self._queue), self._movable):
            with self._lock:
                self._residents[adapter.digest].adapter = adapter
        self._soft.clear()
        for ask in self._queue.values():
            ask.asked = False
        for resident in self._residents.values():
            resident.use = Use.IDLE
        return changed

    def sizes(self) -> dict[str, int]:
        """Bytes by digest of what is on the device, least recently used first. Any thread."""
        with self._lock:
            return {digest: each.adapter.nbytes for digest, each in self._residents.items()}

    def awaited(self) -> frozenset[str]:
        """The digests in the sets that rows wait for, also those on the device. Any thread."""
        # A copy is one step of the interpreter: the step thread may change the queue.
        return frozenset().union(*self._queue.copy())

    def stats(self) -> PoolStats:
        """What the pool holds and has counted. Any thread."""
        with self._lock:
            kept = self._kept
            return PoolStats(
                adapters=tuple(
                    AdapterStats(
                        digest=digest,
                        nbytes=resident.adapter.nbytes,
                        in_use=resident.pins,
                        pinned=digest in kept,
                    )
                    for digest, resident in self._residents.items()
                ),
                last_used=dict(self._last_used),
                num_waiting=len(self._queue),
                host_hits=self._host.num_hits,
                disk_loads=self._host.num_misses,
                load_seconds=self._pipeline.seconds,
                evictions=self._evictions,
            )

    def close(self) -> None:
        """Ends the loader threads after what they are at."""
        self._pipeline.close()

    # -- asking -----------------------------------------------------------------------------------

    def _touch(self, digest: str, use: Use) -> Resident:
        resident = self._residents[digest]
        resident.use = max(resident.use, use)
        with self._lock:
            self._residents.move_to_end(digest)
        return resident

    def _pin(self, digest: str, use: Use) -> DeviceAdapter:
        resident = self._touch(digest, use)
        resident.pins += 1
        with self._lock:
            self._last_used[digest] = time.time()
        return resident.adapter

    def _size(self, digest: str) -> int:
        """Bytes; 0 while they are not known."""
        if (resident := self._residents.get(digest)) is not None:
            return resident.adapter.nbytes
        return self._pipeline.size(digest) or 0

    def _may_load_ahead(self) -> bool:
        waiting = sum(packed.nbytes for packed in self._pipeline.packed.values())
        return len(self._pipeline.loading) < MAX_AHEAD and waiting < self._budget

    def _misfit(self, wanted: Collection[str]) -> LorastackError | None:
        """The error of a set that fits in no way, by the sizes known so far; None if it may fit."""
        needed = sum(map(self._size, wanted))
        if needed > self._budget:
            return self._too_large(wanted)
        others = sorted(self._kept.difference(wanted))
        held = sum(map(self._size, others))
        if needed + held <= self._budget:
            return None
        return ResourceExhaustedError(
            f"the request's adapters need {needed} bytes on the device; of the {self._budget} set "
            f"aside, {held} are held by pinned adapters: unload some, or raise "
            "--device-adapter-memory",
            reason=Reason.DEVICE_MEMORY_PINNED,
            digests=",".join(others),
        )

    def _too_large(self, wanted: Collection[str]) -> FailedPreconditionError:
        return FailedPreconditionError(
            f"the request's adapters need {sum(map(self._size, wanted))} bytes on the device, but "
            f"only {self._budget} are set aside: raise --device-adapter-memory",
            reason=Reason.ADAPTER_TOO_LARGE,
            digests=",".join(sorted(wanted)),
        )

    # -- placing ----------------------------------------------------------------------------------

    def _place_all(self, now: float) -> bool:
        """Places the queue's sets up to the first that must wait for room, then the soft ones."""
        changed = self.blocked = False
        for wanted, ask in self._queue.items():
            loaded = all(self._size(digest) for digest in wanted)
            if ask.placed or not loaded or self._misfit(wanted):
                continue
            # Room that waits for a copy serves nobody: one at a time is taken from running rows.
            began_before = -inf if self._pipeline.copying else now - QUANTUM
            if not self._place(wanted, Use.HARD, now, began_before):
                self.blocked = any(each.use is Use.HARD for each in self._residents.values())
                return changed
            ask.placed = changed = True
        return self._place_soft(now) or changed

    def _place_soft(self, now: float) -> bool:
        changed = False
        waiting, copying = self._pipeline.packed, self._pipeline.copying
        used = [
            each.adapter.nbytes for each in self._residents.values() if each.use is not Use.IDLE
        ]
        spare = self._budget - sum(used) - sum(copying.values())
        for wanted in self._soft:
            missing = wanted.difference(self._residents)
            if not missing or any(digest not in waiting for digest in missing):
                continue
            idle = [each for each in wanted - missing if self._residents[each].use is Use.IDLE]
            size = sum(map(self._size, missing.union(idle)))
            if size > spare or len(copying) + len(missing) > MAX_AHEAD:
                continue
            if self._place(wanted, Use.SOFT, now):
                changed, spare = True, spare - size
                for digest in idle:
                    self._touch(digest, Use.SOFT)
        return changed

    def _place(
        self, wanted: Collection[str], use: Use, now: float, began_before: float = -inf
    ) -> bool:
        """Brings what is missing of a set onto the device if room can be made for all of it."""
        missing = sorted(digest for digest in wanted if digest in self._pipeline.packed)
        used = sum(resident.adapter.nbytes for resident in self._residents.values())
        needed = used + sum(self._pipeline.copying.values()) + sum(map(self._size, missing))
        placed = (members for members, ask in self._queue.items() if ask.placed)
        keep = self._kept.union(wanted, *placed)
        victims = choose_victims(
            self._residents.values(),
            needed - self._budget,
            use=use,
            keep=keep,
            began_before=began_before,
        )
        if victims is None:
            return False
        with self._lock:
            self._evictions += len(victims)
            for digest in victims:
                del self._residents[digest]
        for digest in victims:
            self._pipeline.release(digest)
        for digest in missing:
            if (adapter := self._pipeline.copy(digest)) is not None:
                self._take_in(adapter, now)
        return True

    def _movable(self) -> set[str]:
        """What may change its place on the device: nobody has pinned it for a step."""
        return {digest for digest, resident in self._residents.items() if not resident.pins}

    def _take_in(self, adapter: DeviceAdapter, now: float) -> None:
        with self._lock:
            self._residents[adapter.digest] = Resident(adapter, since=now)
