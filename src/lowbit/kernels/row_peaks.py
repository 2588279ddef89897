"""The largest number of each row of logits and its place: what greedy sampling and the check for NaN need."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from lowbit.kernels import native


@cache
def _function() -> Callable[..., int] | None:
    library = native.library()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_row_peaks.argtypes = (pointer, number, number, number, pointer, pointer)
    library.lowbit_row_peaks.restype = ctypes.c_int32
    return cast(Callable[..., int], library.lowbit_row_peaks)


def row_peaks(x: Tensor) -> tuple[list[float], list[int]]:
    """x float32 (rows, width) -> each row's largest number, NaN where it holds one, and its first place."""
    function = _function()
    if function is not None and x.is_cpu and x.dtype is torch.float32 and x.stride(1) == 1:
        rows, width = x.shape
        values, places = (ctypes.c_float * rows)(), (ctypes.c_int64 * rows)()
        if not function(x.data_ptr(), x.stride(0), rows, width, values, places):
            return list(values), list(places)
    return x.amax(dim=1).tolist(), x.argmax(dim=1).tolist()
