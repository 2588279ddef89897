"""Other words for the same numbers, for schemes that the tiles of ``cpu_blocks`` have no place for.

Each comes in two: what a scheme becomes, and its weight in that. Zero points become offsets, groups that are
no whole tiles parts of them, and codes that have no form in groups of 8 codes of more bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.kernels.gguf_blocks import expanded
from lowbit.kernels.packed_linear import COLUMNS
from lowbit.numerics.cutting import scheme_in_rows
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


def packed_scheme(scheme: Scheme, shape: tuple[int, ...]) -> Scheme | None:
    """What is packed of a scheme: block formats taken apart, zero points folded, groups that divide a row."""
    apart = expanded(scheme)
    if apart is None:
        return None
    return _widened(_whole_groups(_folded(scheme_in_rows(apart, shape[-1])), shape))


def _folded(scheme: Scheme) -> Scheme:
    """The scheme with offsets for float zero points beside float32 scales: both are as exact."""
    if scheme.zero != "float" or tuple(scale.name for scale in scheme.scales) != ("f32",) or scheme.offset:
        return scheme
    return replace(scheme, zero="none", offset=True)


def fold(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight in ``_folded``, zero points within float16."""
    zeros, scale = weight.zeros, weight.scales[0] if weight.scales else None
    if weight.scheme.zero != "float" or zeros is None or scale is None:
        return weight
    scheme = _folded(weight.scheme)
    if scheme.offset:
        return replace(weight, scheme=scheme, zeros=None, offsets=(-zeros.float() * scale,))
    far = zeros.abs() > torch.finfo(torch.float16).max
    if not bool(far.any()):
        return weight
    # Bfloat16s from 2^16 on, where neighbours are 512 apart: a code of 8 bits is lost beside them, and in
    # bfloat16 arithmetic too. What is left, -zero * scale, has powers of two to move.
    near, exponent = torch.frexp(zeros.float())
    (rows, columns), (out, width) = scheme.blocks[0], weight.shape[-2:]
    spread = far.repeat_interleave(rows or out, 0)[:out].repeat_interleave(columns or width, 1)[:, :width]
    return replace(
        weight,
        codes=weight.codes.masked_fill(spread, 0),
        scales=(torch.where(far, torch.ldexp(scale.float(), exponent), scale.float()).to(scale.dtype),),
        zeros=torch.where(far, near, zeros.float()).to(zeros.dtype),
    )


def _whole_groups(scheme: Scheme, shape: tuple[int, ...]) -> Scheme:
    """The scheme with smaller groups where its last one is short, or its tiles are not whole.

    Columns that are no multiple of 32 are filled up with zeros: to whole groups, or to whole tiles in groups
    that divide them, whichever is less.
    """
    if scheme.flattened or not scheme.blocks:
        return scheme
    columns, (rows, group) = shape[-1], scheme.blocks[0]
    if group in (0, 8, 16, columns):
        return scheme
    if group > columns:
        part = columns
    elif columns % COLUMNS:
        tiles = -(-columns // COLUMNS) * COLUMNS
        parts = {part: -(-columns // part) * part for part in (group, math.gcd(group, tiles))}
        numbers = sum(scale.bits for scale in scheme.scales[:1]) + 16 * (scheme.zero != "none")
        part = min(parts, key=lambda part: parts[part] * (scheme.weight.bits + numbers / part))
    else:
        part = math.gcd(group, columns)
    if part % COLUMNS and part != columns and not part % 16:
        part = 16
    return scheme if part == group else replace(scheme, blocks=((rows, part), *scheme.blocks[1:]))


def regrouped(weight: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The weight in ``_whole_groups``: each number of a group repeated for the parts it was cut into."""
    group, part = weight.scheme.blocks[0][1], scheme.blocks[0][1]
    count = -(-weight.shape[-1] // part)

    def cut(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(group // part, -1)[..., :count]

    return replace(
        weight,
        scheme=scheme,
        scales=(cut(weight.scales[0]), *weight.scales[1:]),
        zeros=None if weight.zeros is None else cut(weight.zeros),
        offsets=tuple(cut(offset) if level == 0 else offset for level, offset in enumerate(weight.offsets)),
    )


def _widened(scheme: Scheme) -> Scheme:
    """The scheme with codes of more bits for the same numbers, where its own have no form in groups of 8."""
    fmt, group = scheme.weight, scheme.blocks[0][1] if scheme.blocks else 0
    if group != 8 or not fmt.is_integer or int(fmt.bits) not in (1, 5, 6):
        return scheme
    signed = fmt.name.startswith("int")
    bits = 2 if fmt.bits == 1 and not signed else 8
    return replace(scheme, weight=number_format(f"{'int' if signed else 'uint'}{bits}"))


def recoded(weight: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The weight with the codes of ``_widened``; zero points are in units of values and stay."""
    if weight.scheme.weight == scheme.weight:
        return weight
    return replace(weight, scheme=scheme, codes=weight.codes + moved_by(weight.scheme, scheme))


def moved_by(own: Scheme, wide: Scheme) -> int:
    """By how much the codes of ``_widened`` are larger."""
    return int(own.weight.table()[0] - wide.weight.table()[0])
