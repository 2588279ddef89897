"""How the native linear kernels store codes of a number format, and the table of what each is worth."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.gguf_blocks import GRID_TYPES
from lowbit.kernels.grid_codes import grid_table, low_and_high_bytes
from lowbit.kernels.packed_linear import LARGEST_VALUE
from lowbit.numerics.number_formats import NumberFormat


@cache
def code_kind(fmt: NumberFormat) -> str | None:
    """The name in ``CODES`` of how such codes are stored, or None."""
    if fmt.name in GRID_TYPES:
        return GRID_TYPES[fmt.name][0]
    if fmt.name in ("int8", "uint8", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"):
        return fmt.name
    if fmt.values is None or not 1 <= fmt.bits <= 7:
        return None
    table = fmt.table()
    if fmt.bits == 7 and not torch.equal(table, table[0] + torch.arange(128)):
        return None  # the native code adds where it has no registers for a table
    if torch.equal(table.bfloat16().float(), table) or _common_factor(fmt) is not None:
        return f"bits{int(fmt.bits)}"
    return "words4" if fmt.bits == 4 else None


@cache
def _common_factor(fmt: NumberFormat) -> float | None:
    """What divides a 4-bit table's values into whole numbers that bfloat16 holds, or None."""
    if fmt.bits != 4:
        return None
    table = fmt.table().double()
    most = float(table.abs().max())
    for largest in range(1, 2049):
        whole = (table * largest / most).round()
        divides = torch.equal((whole * most / largest).float(), fmt.table())
        if divides and torch.equal(whole.bfloat16().double(), whole):
            return most / largest
    return None


@cache
def whole_table(fmt: NumberFormat) -> tuple[Tensor, float]:
    """float64 (16,): whole numbers up to 4095, nearest to a table's values over a factor; and the factor."""
    table = fmt.table().double()
    most = float(table.abs().max())
    counts = torch.linspace(LARGEST_VALUE / 2, LARGEST_VALUE, 1 << 16, dtype=torch.float64)
    steps = (most / counts).float().double().unsqueeze(1)  # (tries, 1)
    whole = (table / steps).round().clamp(-LARGEST_VALUE, LARGEST_VALUE)
    best = int((whole * steps - table).abs().amax(1).argmin())
    return whole[best], float(steps[best])


@cache
def factor_of(fmt: NumberFormat) -> float:
    """What the numbers in ``value_table`` are multiplied with to be worth what the format says."""
    kind = code_kind(fmt)
    if kind == "words4":
        return whole_table(fmt)[1]
    exact = kind != "bits4" or torch.equal(fmt.table().bfloat16().float(), fmt.table())
    return 1.0 if exact else _common_factor(fmt) or 1.0


@cache
def value_table(fmt: NumberFormat) -> Tensor:
    """bfloat16 (64,): the value of every index the kernel may form, short tables repeated.

    As bytes where more follows: all 128 values of 7 bits, a grid. With a ``factor_of`` 16 numbers of 16 bits
    twice, then 16 float32 values.
    """
    if fmt.name in GRID_TYPES:
        return grid_table(fmt.name)
    if fmt.bits == 8:
        return torch.zeros(64, dtype=torch.bfloat16)
    factor = factor_of(fmt)
    if factor != 1.0:
        words = code_kind(fmt) == "words4"
        numbers = whole_table(fmt)[0].short() if words else (fmt.table().double() / factor).round().bfloat16()
        return torch.cat((numbers.repeat(2).view(torch.uint8), fmt.table().view(torch.uint8)))
    values = fmt.table()[:64].bfloat16()
    if fmt.bits == 7:
        bits = fmt.table().bfloat16().view(torch.int16).int()
        return torch.cat((values.view(torch.uint8), low_and_high_bytes(bits)))
    return values.repeat(64 // len(values)).contiguous()
