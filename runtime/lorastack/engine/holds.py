"""What rows hold: KV pages, and adapters pinned for a step. When a row ends, `free` frees both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorastack.adapters.memory.pool import DevicePool
from lorastack.engine.batch import RowAdapters, RowHeads
from lorastack.engine.pages import Pages, chain_hash
from lorastack.engine.row import Row


class Holds:
    """Step thread only. Remembers each row's pins, so that they are given back exactly once."""

    def __init__(self, pages: Pages, pool: DevicePool) -> None:
        self._pages = pages
        self._pool = pool
        self._pinned: dict[Row, list[str]] = {}

    def pin(self, row: Row, now: float, *, heads: bool) -> RowAdapters | None:
        """The row's LoRAs, all of them, and its heads if they are on the device; None: not now.

        heads: True if it wants them. A row never waits for heads: it goes on undrafted while they
        load, and while a private part lacks the heads that it corrects, or the reverse. Raises the
        pool's errors; what was pinned by then stays the row's until `unpin`.
        """
        loras = self._pool.acquire(row.lora_digests)
        if loras is None:
            row.wait_for_adapters(now)
            return None
        pinned = self._pinned[row] = list(row.lora_digests)
        row.got_adapters(now)
        found = None
        if heads and row.request.heads is not None:
            found = self._pool.try_acquire(row.request.heads.digests)
            if found is not None:
                pinned.extend(row.request.heads.digests)
        return RowAdapters(loras=loras, heads=None if found is None else RowHeads(*found))

    def unpin(self, row: Row) -> None:
        """Give back the row's adapters: its step is over, or it takes none."""
        if digests := self._pinned.pop(row, None):
            self._pool.release(digests)

    def begin(self, row: Row, now: float, make_room: Callable[[], bool]) -> bool:
        """Pages for all of the row's tokens, some of them from the prefix cache; False: too few.

        make_room: frees pages that others hold; False: it found none to free.
        """
        cached, hashes = self._pages.match(row.kv_root, row.cacheable)
        missing = self._pages.pages_for(len(row.tokens)) - len(cached)
        while (fresh := self._pages.allocate(missing)) is None:
            if not make_room():
                self._pages.free(cached)
                return False
        row.admit(cached + fresh, hashes, len(cached) * self._pages.page_size, now)
        return True

    def grow(self, row: Row, num_slots: int) -> bool:
        """Extend the block table to `num_slots` tokens; False, and no change: too few pages."""
        missing = self._pages.pages_for(num_slots) - len(row.pages)
        fresh = self._pages.allocate(max(missing, 0))
        if fresh is None:
            return False
        row.pages.extend(fresh)
        return True

    def publish(self, row: Row, new_tokens: Sequence[int]) -> None:
        """Offer the row's full pages to later rows. new_tokens: those that follow `row.tokens`."""
        size = self._pages.page_size
        fresh = range(len(row.page_hashes), row.num_computed // size)
        if not fresh:  # as after most steps
            return
        tokens = row.tokens + list(new_tokens)
        for index in fresh:
            parent = row.page_hashes[-1] if row.page_hashes else row.kv_root
            page_hash = chain_hash(parent, tokens[index * size : (index + 1) * size])
            row.page_hashes.append(page_hash)
            self._pages.publish(row.pages[index], page_hash, row.lora_digests)

    def free(self, row: Row) -> None:
        """Give back everything that the row holds."""
        self.unpin(row)
        pages, row.pages = row.pages, []
        self._pages.free(pages)
