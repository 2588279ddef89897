"""Memory that ends at a page nobody may touch: a kernel that reads or writes past its tensor dies at once."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)


def _before_guard_page(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose last byte is followed by a page that must not be touched."""
    page, nbytes = mmap.PAGESIZE, math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(shape, dtype=dtype)
    size = -(-nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _LIBC.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=size - nbytes)
    return flat.view(dtype).view(shape)


def at_guard_page(values: Tensor) -> Tensor:
    """A copy of values whose last byte is followed by a page that must not be touched."""
    return _before_guard_page(tuple(values.shape), values.dtype).copy_(values)


def rows_at_guard_page(values: Tensor, stride: int) -> Tensor:
    """A copy of values (rows, columns), ``stride`` elements from row to row; what lies between is poison.

    The last element of the last row, not the end of its stride, is followed by the guard page.
    """
    rows, columns = values.shape
    flat = _before_guard_page(((rows - 1) * stride + columns,), values.dtype)
    flat.view(torch.uint8).fill_(0xFF)
    return flat.as_strided((rows, columns), (stride, 1)).copy_(values)


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python code allocates unset from now on: NaN, or the largest code, and at a guard page.

    So a wrapper's outputs are poisoned before its kernel runs.
    """

    def poisoned(plain: Tensor) -> Tensor:
        if not (plain.is_cpu and plain.is_contiguous() and plain.numel()):
            return plain
        made = _before_guard_page(tuple(plain.shape), plain.dtype)
        made.flatten().view(torch.uint8).fill_(0xFF)
        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        function = getattr(owner, name)

        def replaced(*args: object, _function=function, **keywords: object) -> Tensor:  # type: ignore[no-untyped-def]
            return poisoned(_function(*args, **keywords))

        monkeypatch.setattr(owner, name, replaced)
