"""Rounding without data: the largest |x| or the range of a block gives its scale, codes are the nearest.

What each number means is the format's own definition; a method names its rule:

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
    """Unsigned codes with integer zero points (Jacob et al., 2018), in compressed-tensors' order of steps.

    The zero point comes from the exact scale; the codes from the scale in ``dtype``, which is stored, so that
    they are nearest for it. Both are computed as signed numbers, from -2^(bits-1), and then made unsigned.
    """
    groups = blocked(rows, size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    half = 1 << (bits - 1)
    exact = (high - low) / (2 * half - 1)
    zero = (-half - low / torch.where(exact == 0, 1.0, exact)).clamp(-half, half - 1).round()
    scale = stored_scale(exact, dtype)
    wide = scale.float().unsqueeze(-1)
    steps = groups / torch.where(wide == 0, 1.0, wide) + zero.unsqueeze(-1)
    codes = steps.clamp(-half, half - 1).round() + half
    return Ranged(codes.to(torch.uint8).flatten(1)[:, : rows.shape[1]], scale, (zero + half).to(torch.uint8))


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in the dtype it is stored in; one that would vanish or overflow keeps a finite value."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal
    return torch.where(scale > 0, scale.clamp(min=smallest, max=info.max), scale).to(dtype)


def mx_exponent(amax: Tensor, fmt: NumberFormat, round_up: float = 0.0) -> Tensor:
    """int32: the exponent of each block's scale: floor(log2 amax) less the format's own largest exponent.

    ``round_up``: an amax of at least so many times its power of two counts as the next (compressed-tensors).
    Blocks of zeros get the smallest exponent the format of the scale (e8m0) has.
    """
    limit = max(value for value in fmt.values or () if value == value)
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [1/2, 1)
    exponent = exponent - torch.frexp(torch.tensor(limit))[1]
    if round_up:
        exponent = exponent + (2 * mantissa >= round_up)
    return torch.where(amax == 0, -127, exponent).clamp(-127, 127)


def e8m0_scale(exponent: Tensor) -> Tensor:
    """Powers of two as e8m0, from int exponents of -127 … 127; ``.float()`` of it is exact."""
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
