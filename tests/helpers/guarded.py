"""Memory whose end cannot be overstepped: reading or writing past it ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last one before a page that nobody may touch.

    So it starts anywhere that its element type allows, on no cache line.
    """
    copy = guarded_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def guarded_bytes(nbytes: int) -> Tensor:
    """uint8 [nbytes] before such a page, all ones: NaN as numbers, -1 as indices."""
    whole = -(-nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + PAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    end = ctypes.c_void_p(data.data_ptr() + whole)
    assert libc.mprotect(end, PAGE, PROT_NONE) == 0, ctypes.get_errno()
    return data[whole - nbytes : whole].fill_(255)
