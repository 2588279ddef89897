"""IntegerGrid: where round-to-nearest, GPTQ and AWQ put a group of weights; one rule for all three.

A group of a row's columns shares a scale and, where asymmetric, an integer zero point:

    symmetric    scale = 2 max|w| / (2^bits - 1)            zero = 2^(bits - 1)
    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)   zero = round(-min(w, 0) / scale)
    code = round(w / scale) + zero, kept in 0 … 2^bits - 1        w is about (code - zero) * scale

Scales are rounded to f16, as GPTQ and AWQ files store them, *before* codes are taken, so that codes are the
nearest ones under the scale a reader will see. Zero is always on the grid: a pruned weight stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import LowbitError
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

LARGEST_GROUP, SMALLEST_GROUP = 128, 16
_SMALLEST_SCALE = 2.0**-24  # of f16: below it a scale would become 0


@dataclass(frozen=True)
class IntegerGrid:
    """``bits`` from 2 to 8; ``symmetric``: no stored zero point."""

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 8, "integer grids have 2 to 8 bits"

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (..., columns) -> float32 scales and zeros (...), the scales being f16 numbers."""
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        reach = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        scale = (reach / self.highest).half().float().clamp(min=_SMALLEST_SCALE)
        scale = torch.where(reach == 0, torch.ones_like(scale), scale)
        if self.symmetric:
            return scale, torch.full_like(scale, 1 << self.bits - 1)
        return scale, (-low / scale).round().clamp(0, self.highest)

    def encode(self, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as float32; ``scale`` and ``zero`` broadcast."""
        return ((weights / scale).round_() + zero).clamp_(0, self.highest)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """What the codes are worth."""
        return (codes - zero) * scale

    def scheme(self, group: int, columns: int, reordered: bool = False) -> Scheme:
        """The scheme of a matrix of so many columns."""
        kind = "int" if self.symmetric else "uint"
        return Scheme(
            number_format(f"{kind}{self.bits}"),
            ((1, 0 if group >= columns else group),),
            (number_format("f16"),),
            zero="none" if self.symmetric else "integer",
            reordered=reordered,
        )


def columns_of_group(group_size: int | None, columns: int) -> int:
    """Columns that share a scale: ``group_size``, all for -1; None is the usual choice.

    That is the largest power of two up to 128 that divides the columns, or all of them where it is tiny.
    """
    if group_size is None:
        size = LARGEST_GROUP
        while columns % size:
            size //= 2
        return size if size >= SMALLEST_GROUP else columns
    assert group_size == -1 or group_size > 0, "a group has columns"
    return columns if group_size == -1 else min(group_size, columns)


def in_groups(weight: Tensor, group: int) -> Tensor:
    """(out, columns) -> (out, groups, group); a last short group is filled up with zeros."""
    missing = -weight.shape[1] % group
    padded = functional.pad(weight, (0, missing)) if missing else weight
    return padded.unflatten(1, (-1, group))


def fake_quantize(weight: Tensor, grid: IntegerGrid, group: int) -> Tensor:
    """float32 (out, columns): the weight after rounding to nearest."""
    groups = in_groups(weight, group)
    scale, zero = (number.unsqueeze(-1) for number in grid.fit(groups))
    return grid.decode(grid.encode(groups, scale, zero), scale, zero).flatten(1)[:, : weight.shape[1]]


def round_to_nearest(weight: Tensor, grid: IntegerGrid, group: int, origin: str = "") -> QuantizedTensor:
    """float32 (out, columns) on the grid, each weight by itself."""
    check_finite(weight, origin)
    groups = in_groups(weight, group)
    scale, zero = grid.fit(groups)
    codes = grid.encode(groups, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(1)[:, : weight.shape[1]]
    return assemble(grid, group, codes, scale, zero, origin=origin)


def assemble(
    grid: IntegerGrid,
    group: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    column_order: Tensor | None = None,
    origin: str = "",
) -> QuantizedTensor:
    """Codes (out, columns) in stored order, scales and zeros (out, groups), all float32, as one weight."""
    check_finite(scales.half(), origin)
    return QuantizedTensor(
        grid.scheme(group, codes.shape[1], column_order is not None),
        tuple(codes.shape),
        codes.to(torch.uint8).contiguous(),
        (scales.half().contiguous(),),
        None if grid.symmetric else zeros.to(torch.uint8).contiguous(),
        column_order=column_order,
        origin=origin,
    )


def check_finite(numbers: Tensor, origin: str) -> None:
    """E0215 where a weight to be quantized, or the f16 scale it needs, is NaN or infinite."""
    if not bool(numbers.isfinite().all()):
        count = int((~numbers.isfinite()).sum())
        raise LowbitError(
            "E0215",
            f"{origin}: {count} of {numbers.numel()} weights (or the f16 scales of their groups) are NaN or "
            "infinite; the float checkpoint is damaged, download it again (lowbit check shows all)",
        )
