"""Large zeroed memory of this process, and having it there before it is written."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 21  # bytes made ready at a time: a huge page, 2 to 6 ms where a host has to find one
_LINE = 64  # bytes of a cache line
_SHARED = 1 << 25  # bytes that small tensors share
_POPULATE_WRITE = (
    23  # MADV_POPULATE_WRITE: faults pages in as a write would, and changes nothing (Linux 5.14)
)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory that costs nothing until it is written, in huge pages where the system has them.

    Pages of the cache are scattered: with 4 KiB of memory a page, each would miss the address cache.
    """
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    # Private: the pages of shared memory are small ones, whatever is advised.
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a system, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


class _Room:
    """Memory that small tensors share, one behind another, so that they lie in huge pages too."""

    def __init__(self) -> None:
        self.left: Tensor | None = None
        self.lock = threading.Lock()

    def take(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,), at a cache line, not yet written; freed with what shares it."""
        wanted = -(-nbytes // _LINE) * _LINE
        if wanted > _SHARED // 2:
            return zeros((nbytes,), torch.uint8)
        with self.lock:
            if self.left is None or len(self.left) < wanted:
                self.left = zeros((_SHARED,), torch.uint8)
            taken, self.left = self.left[:nbytes], self.left[wanted:]
        return taken


_room = _Room()


def room(nbytes: int) -> Tensor:
    """uint8 (nbytes,) for a weight: at a cache line, in huge pages, and not there before it is written.

    What is read once a step from end to end misses the address cache for every 4 KiB otherwise. Up to 16 MB it
    shares memory with its neighbours, and is freed with them.
    """
    return _room.take(nbytes)


def populate(tensor: Tensor) -> Iterator[None]:
    """Have the memory of a contiguous tensor there, a piece a step; numbers in it stay what they are.

    Ends early where the system does not know how.
    """
    if sys.platform != "linux":
        return
    start = tensor.data_ptr() & -mmap.PAGESIZE
    end = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for border in range(start // PIECE * PIECE, end, PIECE):
        first, last = max(border, start), min(border + PIECE, end)
        if madvise(first, last - first, _POPULATE_WRITE) != 0:
            return
        yield
