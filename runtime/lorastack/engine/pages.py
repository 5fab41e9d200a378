"""KV page ids and the prefix cache. Plain ints and hashes; the tensor is the runner's.

A page is free, held (count > 0), or cached: full of accepted KV, held by nobody, kept under its
hash until room is needed (least recently used first). The hash chains over the row's adapters and
all tokens up to the page's end, so that equal hashes mean equal KV.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from lorastack.request import LoraUse

ROOT_SALT = b"lorastack-kv-1"


def root_hash(loras: Iterable[LoraUse], rope_length: int = 0) -> bytes:
    """The hash that a sequence's chain starts from: all that shapes its KV beside the tokens."""
    key = ";".join(f"{use.digest}*{use.scale!r}" for use in loras)
    if rope_length:
        key += f";{rope_length}"
    return hashlib.blake2b(ROOT_SALT + key.encode(), digest_size=16).digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full page. parent: the hash of the page before it, or the root."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class Pages:
    """Who holds which page."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._loras_of: dict[int, tuple[str, ...]] = {}  # LoRA digests of a published page
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and that `match` may give to a later row."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that rows hold, shared ones once."""
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, held once; None, and no change: too few."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def free(self, pages: Sequence[int]) -> None:
        """Give up one hold on each page. Cached pages of a row are reused from its last one on."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} freed twice"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def match(self, root: bytes, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Pages (now held) and hashes of the longest cached prefix, the last token left out.

        The last token is always computed again: the heads need its hidden state.
        """
        pages: list[int] = []
        hashes: list[bytes] = []
        parent = root
        for start in range(0, len(token_ids) - self.page_size, self.page_size):
            parent = chain_hash(parent, token_ids[start : start + self.page_size])
            page = self._page_of.get(parent)
            if page is None:
                break
            self._holders[page] += 1
            self._cached.pop(page, None)
            pages.append(page)
            hashes.append(parent)
        return pages, hashes

    def publish(self, page: int, page_hash: bytes, loras: tuple[str, ...] = ()) -> None:
        """Offer a held page, full of accepted KV, to later rows. The first of equal pages stays.

        loras: digests of the row's LoRAs, by which `forget` finds the page.
        """
        assert self._holders[page] > 0, f"page {page} published by nobody"
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash
            self._loras_of[page] = loras

    def forget(self, digest: str) -> None:
        """Take this LoRA's pages out of the cache: no later row will ask for them."""
        for page in [page for page, loras in self._loras_of.items() if digest in loras]:
            self._withdraw(page)
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._withdraw(page)
        self._holders[page] = 1
        return page

    def _withdraw(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)], self._loras_of[page]
