"""Rounding without data: the largest |x| or the range of a block gives its scale, codes are the nearest.

What each number means is formats.md's chapter on numerics and the tools' own code; a method names its rule:

    absmax    scale = max|x| / limit, symmetric
    range     scale = (max - min) / (levels - 1), an integer zero point, 0 always representable
    mx        scale = a power of two for each block (OCP Microscaling v1.0), its exponent rounded as asked
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.encode import encode
from lowbit.numerics.number_formats import NumberFormat


def blocked(rows: Tensor, size: int) -> Tensor:
    """(rows, in) -> (rows, blocks, size); 0 = one block; a short last block is filled with zeros."""
    columns = rows.shape[1]
    size = size or columns
    if columns % size:
        rows = torch.nn.functional.pad(rows, (0, -columns % size))
    return rows.unflatten(-1, (-1, size))


def largest(rows: Tensor, size: int) -> Tensor:
    """float32 (rows, blocks): the largest |x| of each block."""
    return blocked(rows, size).abs().amax(-1)


def scaled_codes(rows: Tensor, scale: Tensor, size: int, fmt: NumberFormat) -> Tensor:
    """uint8 (rows, in): codes nearest to x / scale, 0 where the scale is 0; scale (rows, blocks) float32."""
    return encode(rows, scale, size, fmt)


@dataclass(frozen=True)
class Ranged:
    """Codes with a scale and a zero point in code units for each block."""

    codes: Tensor
    scale: Tensor  # (rows, blocks), in the dtype asked for
    zero: Tensor  # uint8 (rows, blocks)


def round_range(rows: Tensor, size: int, bits: int, dtype: torch.dtype) -> Ranged:
    """Unsigned codes with integer zero points (Jacob et al., 2018); the scale is rounded to ``dtype`` first,
    so that codes are nearest for the scale that is stored."""
    groups = blocked(rows, size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    levels = (1 << bits) - 1
    scale = stored_scale((high - low) / levels, dtype)
    wide = scale.float()
    safe = torch.where(wide == 0, 1.0, wide)
    zero = (-low / safe).round().clamp(0, levels)
    steps = (groups / safe.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    codes = steps.clamp(0, levels).to(torch.uint8).flatten(1)[:, : rows.shape[1]]
    return Ranged(codes, scale, zero.to(torch.uint8))


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in the dtype it is stored in; one that would vanish or overflow keeps a finite value."""
    info = torch.finfo(dtype)
    tiny = torch.where(scale > 0, scale.clamp(min=info.smallest_normal, max=info.max), scale)
    return tiny.to(dtype)


def mx_exponent(amax: Tensor, fmt: NumberFormat, round_up: float = 0.0) -> Tensor:
    """float32: the exponent of each block's scale: floor(log2 amax) less the format's own largest exponent.

    ``round_up``: an amax of at least so many times its power of two counts as the next (compressed-tensors).
    Blocks of zeros get the smallest exponent the format of the scale (e8m0) has.
    """
    limit = max(value for value in fmt.values or () if value == value)
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [1/2, 1)
    exponent = exponent - torch.frexp(torch.tensor(limit))[1]
    if round_up:
        exponent = exponent + (2 * mantissa >= round_up)
    return torch.where(amax == 0, -127, exponent).float().clamp(-127, 127)
