"""Memory in huge pages for weights, which every step reads from end to end; giving memory back.

270 MB of weights are 66,000 pages of 4 KiB but 130 of 2 MiB: the processor looks up fewer addresses
and reads ahead further. Where the system gives no huge pages this is plain memory.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from lorastack.layout import ALIGNMENT

HUGE_PAGE = 2 << 20
BLOCK = 64 << 20  # bytes reserved at once; the system gives memory only for what is touched


class HugePages:
    """Copies tensors into blocks of huge pages; a block lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, source: Tensor) -> Tensor:
        """A contiguous copy that begins on a cache line."""
        nbytes = source.numel() * source.element_size()
        if len(self._free) < nbytes:
            self._free = _reserve(max(nbytes, BLOCK))
        place, self._free = self._free[:nbytes], self._free[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return place.view(source.dtype).view(source.shape).copy_(source)


def give_back() -> None:
    """Return freed memory to the system.

    glibc by itself keeps what lies between blocks in use: a fifth of a 7B model after it was
    quantised to 4 bits.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _reserve(nbytes: int) -> Tensor:
    """At least `nbytes` untouched bytes that begin on a huge page."""
    size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    block = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            block.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(block, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + size]
