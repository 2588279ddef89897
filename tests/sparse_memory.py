"""Tensors of more than 2^31 elements of which only what is touched takes memory."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_NO_RESERVE = 0x4000  # MAP_NORESERVE: Python 3.11 has no name for it


def sparse_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that lie nowhere until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def far_apart(values: Tensor) -> Tensor:
    """A copy of values (rows, ...), each row contiguous; the last one starts past element 2^31."""
    rows, width = values.shape[0], values[0].numel()
    stride = (1 << 31) // (rows - 1) + 1
    flat = sparse_zeros(((rows - 1) * stride + width,), values.dtype)
    inner = values[0].contiguous().stride()
    return flat.as_strided(tuple(values.shape), (stride, *inner)).copy_(values)
