"""Memory for packed weights in large pages, where the system has them.

Weights are read once a step from end to end. In pages of 4 KB the processor looks up a new page
every few dozen nanoseconds and its prefetcher stops at each border; in pages of 2 MB both are rare.
A layer is often smaller than such a page, hence layers share pieces of memory; a piece is freed
with its last tensor.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 1 << 21
_LARGEST = 1 << 26  # of a piece that several tensors share
_ALIGNMENT = 64


class LargePages:
    """Gives out uninitialised tensors one after the other from pieces of memory that grow.

    A piece asks for large pages (Linux, ``madvise``); where there are none it is common memory.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, aligned to 64 bytes."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > self._piece.numel():
            grown = min(max(2 * self._piece.numel(), PAGE), _LARGEST)
            self._piece, self._used = _map(max(nbytes, grown)), 0
        taken = self._piece[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return taken.view(dtype).view(shape)


def _map(nbytes: int) -> Tensor:
    """At least ``nbytes`` that start and end at the border of a large page."""
    whole = -(-nbytes // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(whole, dtype=torch.uint8)
    memory = mmap.mmap(-1, whole + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=whole, offset=start)
