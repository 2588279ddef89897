"""Cutting a quantized weight in rows or columns, or its blocks into smaller ones, exactly: every weight keeps
its value.

A row cut may fall inside a block of rows: the block's numbers are then repeated over smaller blocks, or
where its rows lie apart kept for those that are left. A column cut falls on the borders of ``column_unit``:
what shares a scale, or an input's scale, stays together; or on those of ``column_borders``, where columns
have codebooks of their own. Tensors are cut as views, so that of a mapped file only the part is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.number_formats import RowVectorLayout, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK

_LEAST_IN_ROWS = 16  # columns that share a scale once blocks end with rows: fewer are not worth it


def column_unit(scheme: Scheme, columns: int) -> int:
    """So many neighbouring stored columns cannot be parted; where blocks run over row ends, those of the
    smaller ones that do not (``in_rows``), or all where these would be tiny."""
    if scheme.flattened:
        scheme = scheme_in_rows(scheme, columns)
        if min(width for _, width in scheme.blocks) < _LEAST_IN_ROWS:
            return columns
    unit = 1 if scheme.weight.block is None else scheme.weight.block.weights
    unit = unit if scheme.weight.vectors is None else scheme.weight.vectors.column_unit(columns)
    unit = unit if scheme.weight.trellis is None else BLOCK
    unit = unit if scheme.weight.lattice is None else columns
    for _, width in scheme.blocks:
        unit = math.lcm(unit, width or 1)
    if scheme.activation is not None:
        unit = math.lcm(unit, scheme.activation.block[1] or 1)
    if scheme.rotation is not None:
        unit = math.lcm(unit, scheme.rotation.size)
    return unit


def column_borders(scheme: Scheme, columns: int, ranks: int) -> list[int] | None:
    """Where a weight is cut whose stored columns have codebooks or numbers of their own; None for others,
    and where there are too few columns for all ranks."""
    layout = _parted(scheme)
    return None if layout is None or layout.columns != columns else layout.borders(ranks)


def _parted(scheme: Scheme) -> RowVectorLayout | None:
    layout = scheme.weight.vectors
    return layout if isinstance(layout, RowVectorLayout) and layout.width else None


def row_unit(scheme: Scheme) -> int:
    """A cut between so many rows parts no block, nor one of a rotation of them."""
    rotation, heights = scheme.output_rotation, () if scheme.scattered else scheme.heights
    return math.lcm(1 if rotation is None else rotation.size, *(rows or 1 for rows in heights))


def cut_columns(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Stored columns ``start:stop``. ``column_order`` then holds the inputs they multiply, of the whole."""
    columns = weight.shape[-1]
    unit, parted = column_unit(weight.scheme.weight_alone, columns), _parted(weight.scheme)
    if parted is not None and parted.part(start, stop) is not None:
        unit = 1
    if start % unit or (stop % unit and stop != columns):
        raise LowbitError(
            "E0702", f"{weight.origin}: columns {start}:{stop} cut a group of {unit} columns in two"
        )
    if (start, stop) == (0, columns):
        return weight
    weight = in_rows(weight)
    layout, coded = weight.scheme.weight.block, weight.scheme.weight.vectors or weight.scheme.weight.trellis
    codes, codebooks = weight.codes[..., start:stop], weight.codebooks
    if parted is not None:
        books, _ = parted.books_of(start, stop)
        assert codebooks is not None, "a format with vectors has them"
        codes, codebooks = parted.cut(weight.codes, start, stop), codebooks[books.start : books.stop]
    elif coded is not None:
        codes = weight.codes[..., coded.row_bytes(start) : coded.row_bytes(stop)]
    if layout is not None:
        first, last = start // layout.weights, -(-stop // layout.weights)
        codes = weight.codes[..., first * layout.bytes : last * layout.bytes]

    if stop == columns and weight.scheme.weight.trellis is not None:
        end = weight.scheme.weight.trellis.blocks(stop)
    else:
        end = stop

    def cut(per_block: Tensor, level: int) -> Tensor:
        width = weight.scheme.blocks[level][1]
        return per_block[..., start // width : -(-end // width)] if width else per_block

    order = weight.column_order
    return replace(
        weight,
        scheme=columns_scheme(weight.scheme, columns, start, stop),
        shape=(*weight.shape[:-1], stop - start),
        codes=codes,
        codebooks=codebooks,
        scales=tuple(cut(s, i) for i, s in enumerate(weight.scales)),
        zeros=None if weight.zeros is None else cut(weight.zeros, 0),
        offsets=tuple(cut(o, i) for i, o in enumerate(weight.offsets)),
        column_order=None if order is None else order[start:stop],
        outliers=None if weight.outliers is None else weight.outliers.cut(start, stop),
    )


def columns_scheme(scheme: Scheme, columns: int, start: int, stop: int) -> Scheme:
    """The scheme of ``cut_columns``'s result."""
    scheme, parted = scheme_in_rows(scheme, columns), _parted(scheme)
    part = None if parted is None else parted.part(start, stop)
    return scheme if part is None else replace(scheme, weight=number_format(part.name))


def cut_rows(weight: QuantizedTensor, runs: Sequence[tuple[int, int]]) -> QuantizedTensor:
    """The rows of each (start, stop), one run below another.

    Where vectors of several rows do not end there, they are decoded; so are several runs where blocks of a
    trellis do not. Of one run a trellis has the blocks that it lies in.
    """
    if weight.scheme.rows_together > 1:
        scheme = parted_scheme(weight.scheme, (weight.shape[-2], weight.shape[-1]), runs)
        shape = (sum(stop - start for start, stop in runs), weight.shape[-1])
        if scheme.is_dense:
            matrix = torch.cat([_floats(weight, *run).to(scheme.weight.dtype) for run in runs])
            return QuantizedTensor(scheme, shape, matrix, origin=weight.origin)
        if weight.scheme.weight.trellis is not None:
            parts = [weight.rows(start, stop) for start, stop in runs]
            if len(runs) == 1:
                return parts[0]
            codes = torch.cat([part.codes for part in parts])
            outputs = torch.cat([part.scales[0] for part in parts])
            return replace(weight, shape=shape, codes=codes, scales=(outputs, weight.scales[1]))
        if weight.scheme.whole_columns:
            parts = [weight.rows(start, stop, ragged=True) for start, stop in runs]
            codes = torch.cat([part.codes for part in parts])
            return replace(weight, shape=shape, codes=codes)
    if len(runs) > 1 and weight.scheme.whole_columns:
        return pick_rows(weight, torch.cat([torch.arange(start, stop) for start, stop in runs]))
    finer = _parted_at(weight, [border for run in runs for border in run])
    joined = concatenate([finer.rows(start, stop, ragged=True) for start, stop in runs])
    assert joined is not None, "runs of one weight are alike, and end on its blocks' borders"
    return joined


def _floats(weight: QuantizedTensor, start: int, stop: int) -> Tensor:
    """float32 (stop - start, in), of rows that may begin or end inside what lies together."""
    together = weight.scheme.rows_together
    first, last = start // together * together, min(-(-stop // together) * together, weight.shape[-2])
    return weight.rows(first, last).dequantize()[start - first : stop - first]


def pick_rows(weight: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """Row i of the result is row ``order[i]``; there may be fewer or more than there were."""
    picked = weight.permute_rows(order)
    return replace(picked, shape=(*weight.shape[:-2], len(order), weight.shape[-1]))


def _parted_at(weight: QuantizedTensor, borders: list[int]) -> QuantizedTensor:
    """The same weight with blocks low enough that none crosses one of the borders."""
    scheme, (out, columns) = weight.scheme, weight.shape[-2:]
    inside = [border for border in borders if 0 < border < out]
    axis = -1 if scheme.flattened else -2
    scale = columns if scheme.flattened else 1
    sizes = [width if scheme.flattened else rows for rows, width in scheme.blocks]
    if scheme.scattered:
        # As many rows of a block as its share of the shortest piece: exact where blocks are spread evenly.
        ends = sorted({0, *inside, out})
        least = min(stop - start for start, stop in pairwise(ends))
        parted = [size if size <= 1 else max(2, size * least // out) for size in sizes]
    else:
        parted = [size and math.gcd(size, *(border * scale for border in inside)) for size in sizes]
    if parted == sizes:
        return weight
    whole = out * scale

    def split(per_block: Tensor, level: int) -> Tensor:
        times = sizes[level] // parted[level] if sizes[level] else 1
        if times == 1 or scheme.scattered:
            return per_block
        return per_block.repeat_interleave(times, axis).narrow(axis, 0, -(-whole // parted[level]))

    blocks = tuple(
        (rows, size) if scheme.flattened else (size, width)
        for size, (rows, width) in zip(parted, scheme.blocks, strict=True)
    )
    return replace(
        weight,
        scheme=replace(scheme, blocks=blocks),
        scales=tuple(split(s, i) for i, s in enumerate(weight.scales)),
        zeros=None if weight.zeros is None else split(weight.zeros, 0),
        offsets=tuple(split(o, i) for i, o in enumerate(weight.offsets)),
    )


def scheme_in_rows(scheme: Scheme, columns: int) -> Scheme:
    """The scheme of ``in_rows``'s result."""
    if not scheme.flattened:
        return scheme
    blocks = tuple((1, math.gcd(width, columns)) for _, width in scheme.blocks)
    return replace(scheme, blocks=blocks, flattened=False)


def in_rows(weight: QuantizedTensor) -> QuantizedTensor:
    """Blocks that run over row ends as smaller ones that do not: the widest that divide block and row."""
    out, columns = weight.shape[-2:]
    scheme = scheme_in_rows(weight.scheme, columns)
    if scheme == weight.scheme:
        return weight

    def spread(per_block: Tensor, level: int) -> Tensor:
        width, part = weight.scheme.blocks[level][1], scheme.blocks[level][1]
        firsts = torch.arange(0, out * columns, part)
        return per_block.flatten()[firsts // width].view(out, columns // part)

    return replace(
        weight,
        scheme=scheme,
        scales=tuple(spread(s, i) for i, s in enumerate(weight.scales)),
        zeros=None if weight.zeros is None else spread(weight.zeros, 0),
        offsets=tuple(spread(o, i) for i, o in enumerate(weight.offsets)),
    )


def parted_scheme(scheme: Scheme, shape: tuple[int, int], runs: Sequence[tuple[int, int]]) -> Scheme:
    """The scheme of ``cut_rows``'s result."""
    trellis = scheme.weight.trellis
    if trellis is not None and len(runs) == 1:
        skip = (trellis.skip + runs[0][0]) % BLOCK
        return replace(scheme, weight=number_format(replace(trellis, skip=skip).name))
    if trellis is not None and trellis.skip:
        return scheme.decoded
    if (together := scheme.rows_together) > 1:
        inside = [border for run in runs for border in run if border % together]
        if inside not in ([], [shape[0]]) or (inside and runs[-1][1] != shape[0]):
            return scheme.decoded
        if scheme.whole_columns or trellis is not None:
            return scheme
    empty = torch.empty(0)
    bare = QuantizedTensor(scheme, shape, empty)
    finer = _parted_at(bare, [border for run in runs for border in run]).scheme
    if len(runs) == 1 or finer.flattened or finer.whole_columns:
        return finer
    return replace(finer, blocks=tuple((rows or 1, width) for rows, width in finer.blocks))
