"""Memory that ends at a page nobody may touch: a kernel that reads or writes past its tensor dies at once."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def at_guard_page(values: Tensor) -> Tensor:
    """A copy of values whose last byte is followed by a page that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=size - values.nbytes)
    return flat.view(values.shape).copy_(values)
