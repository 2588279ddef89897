"""Codes nearest to x / scale in one native pass (csrc/encode.cpp), for quantizing at load.

``numerics.number_formats.nearest_code`` is the definition; this gives the same codes, bit for bit.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.numerics.number_formats import NumberFormat, nearest_code

_TABLE, _E4M3, _INTEGER = range(3)


class _Format(ctypes.Structure):
    """``lowbit_code_format`` of csrc/encode.cpp."""

    _fields_ = (
        ("thresholds", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    )


@cache
def _described(fmt: NumberFormat) -> tuple[_Format, tuple[Tensor, ...]] | None:
    """The native description and the tensors it points at, or None where there is none."""
    if fmt.is_integer:
        low = -(1 << int(fmt.bits) - 1) if fmt.name.startswith("int") else 0
        return _Format(None, None, _INTEGER, 0, low, low + (1 << int(fmt.bits)) - 1), ()
    if fmt.name == "e4m3":
        return _Format(None, None, _E4M3, 0, 0, 0), ()
    if fmt.values is None or fmt.bits > 6:
        return None
    pairs: dict[float, int] = {}
    for code, value in enumerate(fmt.values):
        if math.isfinite(value):
            pairs.setdefault(value, code)
    values = sorted(pairs)
    codes = [pairs[value] for value in values]
    thresholds = []
    for number, (lower, upper) in enumerate(pairwise(values)):
        middle = (lower + upper) / 2
        single = torch.tensor(middle, dtype=torch.float32)
        if single.item() > middle:  # a float above it is above the largest float below it
            single = torch.nextafter(single, torch.tensor(-math.inf))
        elif single.item() == middle and fmt.name.startswith("e") and codes[number] % 2:
            single = torch.nextafter(single, torch.tensor(-math.inf))  # the tie goes up, to the even code
        thresholds.append(single)
    held = (torch.stack(thresholds), torch.tensor(codes, dtype=torch.uint8))
    described = _Format(held[0].data_ptr(), held[1].data_ptr(), _TABLE, len(values), 0, 0)
    return described, held


@cache
def _function() -> ctypes._NamedFuncPointer | None:
    library = native.library()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_encode.argtypes = (pointer, number, number, number, pointer, number, pointer, pointer)
    library.lowbit_encode.restype = None
    return library.lowbit_encode


def encode(x: Tensor, scale: Tensor, group: int, fmt: NumberFormat) -> Tensor:
    """uint8 (rows, columns): the codes of ``fmt`` nearest to x / scale, 0 / 0 being 0.

    x: float32 (rows, columns); scale: float32 (rows, groups), or (1, 1) for all, one for ``group`` columns,
    0 = all of them; the last group may be short.
    """
    rows, columns = x.shape
    group = group or columns
    groups = -(-columns // group)
    scale = scale.float().expand(rows, groups)
    function, described = _function(), _described(fmt)
    if (
        function is None
        or described is None
        or not x.is_cpu
        or x.dtype is not torch.float32
        or x.stride(1) != 1
    ):
        spread = scale.repeat_interleave(group, 1)[:, :columns]
        return nearest_code(torch.where(spread == 0, 0.0, x / spread), fmt)
    out = torch.empty(rows, columns, dtype=torch.uint8)
    scale = scale.contiguous()
    address = ctypes.addressof(described[0])
    function(x.data_ptr(), rows, columns, x.stride(0), scale.data_ptr(), group, address, out.data_ptr())
    return out
