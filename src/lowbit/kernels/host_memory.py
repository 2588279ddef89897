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


class WeightRoom:
    """Memory that a model's small weights share, one behind another, so that they lie in huge pages too.

    What is read once a step from end to end misses the address cache for every 4 KiB otherwise. A piece is
    freed with the last weight in it. For one thread.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,), at a cache line, not there before it is written."""
        wanted = -(-nbytes // _LINE) * _LINE
        if wanted > _SHARED // 2:
            return zeros((nbytes,), torch.uint8)
        if len(self._left) < wanted:
            self._left = zeros((_SHARED,), torch.uint8)
        taken, self._left = self._left[:nbytes], self._left[wanted:]
        return taken

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Inside, this thread's ``for_weight`` takes from here."""
        before, _in_use.room = _in_use.room, self
        try:
            yield
        finally:
            _in_use.room = before


class _InUse(threading.local):
    room: WeightRoom | None = None


_in_use = _InUse()


def for_weight(nbytes: int) -> Tensor:
    """uint8 (nbytes,), not yet written: of the room in use, or by itself."""
    room = _in_use.room
    return torch.empty(nbytes, dtype=torch.uint8) if room is None else room.take(nbytes)


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
