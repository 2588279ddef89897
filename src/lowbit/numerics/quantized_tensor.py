"""QuantizedTensor: the one canonical form of a quantized weight, used at load, save and test time only.

Everything a format reader produces means

    weight[r, c] = (value(code[r, c]) - zero[g]) * scale0[g] * scale1[h] + offset[g]

with ``g`` the inner block that holds (r, c), ``h`` an outer block, and ``c`` counted in stored column
order. ``dequantize`` *is* this line in float32; every kernel is tested against it. Where a format has
codebooks, the value is a number of the vector that the code names, or the sum of several. What a trellis
or a lattice means, with a scale for each row and each column, ``numerics.trellis`` and ``numerics.lattice``
say. Outliers are added to single weights; each step is then rounded to their format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.lattice import LatticeLayout
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK, TrellisLayout

_DECODED_AT_ONCE = 1 << 22  # weights


@dataclass(frozen=True)
class Outliers:
    """What is added to single weights: a sparse matrix, row by row (CSR).

    ``starts``: int32 (out + 1,), where each row's begin. ``entries``: int32 (count,), the stored column in
    the low half, the number's bits in the high one.
    """

    starts: Tensor
    entries: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, out: int) -> Outliers:
        """From int64 (count,) places in ascending rows and (count,) numbers of 16 bits."""
        entries = torch.stack((columns.to(torch.uint16).view(torch.int16), values.view(torch.int16)), -1)
        counts = torch.bincount(rows, minlength=out)
        return cls(_starts(counts), entries.view(torch.int32).flatten())

    @property
    def rows(self) -> Tensor:
        """int64 (count,)."""
        return torch.arange(len(self.starts) - 1).repeat_interleave(self.starts.diff())

    @property
    def columns(self) -> Tensor:
        """int64 (count,)."""
        return self.entries.long() & 0xFFFF

    def values(self, fmt: NumberFormat) -> Tensor:
        """(count,) in a format of 16 bits."""
        dtype = fmt.dtype
        assert dtype is not None and dtype.itemsize == 2, "an entry's half is a number"
        return self.entries.contiguous().view(torch.int16).view(-1, 2)[:, 1].contiguous().view(dtype)

    def picked(self, order: Tensor) -> Outliers:
        """Row i of the result is row ``order[i]``."""
        starts = _starts(self.starts.diff()[order])
        moved = (self.starts[:-1][order] - starts[:-1]).repeat_interleave(starts.diff())
        return Outliers(starts, self.entries[torch.arange(len(moved)) + moved])

    def cut(self, start: int, stop: int) -> Outliers:
        """Of stored columns ``start:stop``."""
        inside = (self.columns >= start) & (self.columns < stop)
        counts = torch.bincount(self.rows[inside], minlength=len(self.starts) - 1)
        return Outliers(_starts(counts), self.entries[inside] - start)


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of logical ``shape`` (..., out, in).

    ``codes``: uint8 (..., out, in), one code a byte; raw bytes (..., out, row bytes) for block formats and
    codebooks, (..., vectors, bytes) where those have several rows; the matrix itself for dense schemes.
    ``scales[i]``: (..., ceil(out/rows_i), ceil(in/cols_i)),
    or (..., blocks) when flattened, in the dtype the file has (e8m0/e4m3 as torch float8). ``zeros``: like
    ``scales[0]``, in code units. ``offsets[i]``: like ``scales[i]``; the offset is their product.
    ``column_order``: int64 (in,): stored column j multiplies input ``column_order[j]``.
    ``codebooks``: float (books, vectors, length), of formats with ``vectors``. ``origin``: "file: module",
    for messages. ``row_groups``: int64 (out,), of a scattered scheme: which row of ``scales[i]`` a row has at
    every level whose blocks have several; those are (..., groups, columns). ``outliers``: of a scheme that
    has them, and only of matrices.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    scales: tuple[Tensor, ...] = ()
    zeros: Tensor | None = None
    offsets: tuple[Tensor, ...] = ()
    column_order: Tensor | None = None
    origin: str = ""
    row_groups: Tensor | None = None
    codebooks: Tensor | None = None
    outliers: Outliers | None = None

    def dequantize(self) -> Tensor:
        """float32 (..., out, in), columns in the input's order. The definition of every scheme."""
        weight = self._dequantize_stored()
        if self.column_order is None:
            return weight
        logical = torch.empty_like(weight)
        logical[..., self.column_order] = weight
        return logical

    def _dequantize_stored(self) -> Tensor:
        if self.scheme.is_dense:
            return self.codes.float()
        layout = self.scheme.weight.block
        if layout is not None:
            blocks = self.codes.unflatten(-1, (-1, layout.bytes))  # (..., out, blocks, bytes)
            return layout.decode(blocks).flatten(-2)  # (..., out, in)
        vectors, together = (
            self.scheme.weight.vectors,
            self.scheme.weight.trellis or self.scheme.weight.lattice,
        )
        if together is not None:
            skip = 0 if isinstance(together, LatticeLayout) else together.skip
            return together.decode(self.codes, *self.scales)[skip : skip + self.shape[0], : self.shape[1]]
        if vectors is not None:
            assert self.codebooks is not None, "a format with vectors has them"
            values = vectors.decode(self.codes, self.codebooks)[..., : self.shape[-2], :]
        else:
            values = self.scheme.weight.table(self.codes.device)[self.codes.long()]
        if self.zeros is not None:
            values = self._rounded(values - self._spread(self.zeros, 0))
        if self.scales:
            scales = reduce(torch.mul, (self._spread(s, i) for i, s in enumerate(self.scales)))
            values = self._rounded(values * scales)
        if self.offsets:
            values = values + reduce(torch.mul, (self._spread(o, i) for i, o in enumerate(self.offsets)))
        if self.outliers is not None and self.scheme.outliers is not None:
            at = self.outliers.rows, self.outliers.columns
            values[at] = self._rounded(values[at] + self.outliers.values(self.scheme.outliers).float())
        return values

    def _rounded(self, values: Tensor) -> Tensor:
        """To the outliers' format, where there is one."""
        outliers = self.scheme.outliers
        return values if outliers is None else values.to(outliers.dtype).float()

    def _spread(self, per_block: Tensor, level: int) -> Tensor:
        """float32 (..., out, in): each block's number repeated over the weights it covers."""
        out, columns = self.shape[-2:]
        rows, block_columns = self.scheme.blocks[level]
        per_block = per_block.float()
        if self.scheme.flattened:
            flat = per_block.repeat_interleave(block_columns, -1)[..., : out * columns]
            return flat.unflatten(-1, (out, columns))
        if self.row_groups is not None and rows > 1:
            tall = per_block[..., self.row_groups, :]
        else:
            tall = per_block.repeat_interleave(rows or out, -2)[..., :out, :]
        return tall.repeat_interleave(block_columns or columns, -1)[..., :columns]

    def decoded(self, scheme: Scheme) -> QuantizedTensor:
        """The matrix of floats that the dense ``scheme`` says, some rows at a time."""
        rows, columns = self.shape
        if self.scheme.weight.lattice is not None:
            matrix = self.dequantize().to(scheme.weight.dtype)
            return QuantizedTensor(scheme, self.shape, matrix, origin=self.origin)
        matrix = torch.empty(rows, columns, dtype=scheme.weight.dtype)
        height = max(self.scheme.heights)
        step = max(1, _DECODED_AT_ONCE // columns // height) * height
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            matrix[start:stop] = self.rows(start, stop).dequantize()
        return QuantizedTensor(scheme, self.shape, matrix, origin=self.origin)

    @property
    def nbytes(self) -> int:
        """Bytes the scheme needs for this weight, codes bit-packed."""
        weights = 1
        for size in self.shape:
            weights *= size
        return round(weights * self.scheme.bits_per_weight(self.shape) / 8)

    def rows(self, start: int, stop: int, *, ragged: bool = False) -> QuantizedTensor:
        """Output rows ``start:stop``; they must begin on a block border of every level.

        They must end on one too, unless ``ragged``: the last block of the result may then be short. Those of
        a trellis may begin and end anywhere. Some rows of a lattice's transforms come as plain floats.
        """
        out, together, lattice = self.shape[-2], self.scheme.rows_together, self.scheme.weight.lattice
        if lattice is not None and not together:
            if (start, stop) == (0, out):
                return self
            outputs, inputs = self.scales
            matrix = lattice.some_rows(self.codes, outputs, inputs, start, stop)
            return QuantizedTensor(
                Scheme(number_format("f32")), tuple(matrix.shape), matrix, origin=self.origin
            )
        if self.scheme.weight.trellis is not None:
            return self._rows_of_trellis(self.scheme.weight.trellis, start, stop)
        if self.scheme.flattened and len(self.shape) == 2:
            columns, block = self.shape[-1], self.scheme.blocks[0][1]
            if (start * columns) % block:
                raise LowbitError("E0702", f"{self.origin}: row {start} is inside a block of {block}")
        vectors = self.scheme.weight.vectors
        height = 1 if vectors is None else vectors.height
        if start % height or (stop % height and stop != out and not ragged):
            raise LowbitError(
                "E0702", f"{self.origin}: rows {start}:{stop} cut a vector of {height} rows in two"
            )
        scales = tuple(self._cut_rows(s, i, start, stop, ragged) for i, s in enumerate(self.scales))
        offsets = tuple(self._cut_rows(o, i, start, stop, ragged) for i, o in enumerate(self.offsets))
        zeros = None if self.zeros is None else self._cut_rows(self.zeros, 0, start, stop, ragged)
        assert 0 <= start < stop <= out, "rows() needs a non-empty range inside the matrix"
        return replace(
            self,
            shape=(*self.shape[:-2], stop - start, self.shape[-1]),
            codes=self.codes[..., start // height : -(-stop // height), :],
            scales=scales,
            zeros=zeros,
            offsets=offsets,
            row_groups=None if self.row_groups is None else self.row_groups[start:stop],
            outliers=None if self.outliers is None else self.outliers.picked(torch.arange(start, stop)),
        )

    def _rows_of_trellis(self, layout: TrellisLayout, start: int, stop: int) -> QuantizedTensor:
        """In the blocks that they lie in."""
        assert 0 <= start < stop <= self.shape[0], "rows() needs a non-empty range inside the matrix"
        first, skip = divmod(layout.skip + start, BLOCK)
        blocks = slice(first * BLOCK, layout.blocks(layout.skip + stop))
        outputs, inputs = self.scales
        fmt = number_format(replace(layout, skip=skip).name)
        return replace(
            self,
            scheme=replace(self.scheme, weight=fmt),
            shape=(stop - start, self.shape[1]),
            codes=self.codes[blocks],
            scales=(outputs[blocks], inputs),
        )

    def _cut_rows(self, per_block: Tensor, level: int, start: int, stop: int, ragged: bool) -> Tensor:
        out, columns = self.shape[-2:]
        rows, block_columns = self.scheme.blocks[level]
        if self.scheme.flattened:
            return per_block[..., start * columns // block_columns : -(-stop * columns // block_columns)]
        if rows == 0 or (self.scheme.scattered and rows > 1):
            return per_block
        if start % rows or (stop % rows and stop != out and not ragged):
            raise LowbitError(
                "E0702", f"{self.origin}: rows {start}:{stop} cut a block of {rows} rows in two"
            )
        return per_block[..., start // rows : -(-stop // rows), :]

    def permute_rows(self, order: Tensor) -> QuantizedTensor:
        """Row i of the result is row ``order[i]`` of this, some or all; needs ``Scheme.rows_move``."""
        if not self.scheme.rows_move:
            raise LowbitError(
                "E0702",
                f"{self.origin}: scheme {self.scheme} has blocks of rows; cannot reorder them",
            )

        def pick(per_block: Tensor, level: int) -> Tensor:
            return per_block[..., order, :] if self.scheme.blocks[level][0] == 1 else per_block

        return replace(
            self,
            shape=(*self.shape[:-2], len(order), self.shape[-1]),
            codes=self.codes[..., order, :],
            scales=tuple(pick(s, i) for i, s in enumerate(self.scales)),
            zeros=None if self.zeros is None else pick(self.zeros, 0),
            offsets=tuple(pick(o, i) for i, o in enumerate(self.offsets)),
            row_groups=None if self.row_groups is None else self.row_groups[order],
            outliers=None if self.outliers is None else self.outliers.picked(order),
        )

    def expand(self) -> QuantizedTensor:
        """A block format as small codes with scales and offsets; anything else unchanged."""
        layout = self.scheme.weight.block
        if layout is None:
            return self
        parts = layout.expand(self.codes.unflatten(-1, (-1, layout.bytes)))
        f32 = number_format("f32")
        scheme = Scheme(
            weight=number_format(parts.number_format),
            blocks=tuple((1, columns) for columns in parts.columns),
            scales=(f32,) * len(parts.columns),
            offset=bool(parts.offsets),
            activation=self.scheme.activation,
        )
        return replace(
            self,
            scheme=scheme,
            codes=parts.codes.flatten(-2),
            scales=tuple(s.flatten(-2) for s in parts.scales),
            offsets=tuple(o.flatten(-2) for o in parts.offsets),
        )


def concatenate(parts: list[QuantizedTensor]) -> QuantizedTensor | None:
    """One weight whose rows are the parts' rows, or None where their schemes do not allow it.

    Allowed: equal schemes, columns and codebooks, no column order of their own that differs, and each part
    but the last ending on a block border. A scale for the whole axis becomes one scale a row, exactly, unless
    there is one for each column.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.scheme != first.scheme or part.shape[-1] != first.shape[-1] for part in parts):
        return None
    if any(not _same(part.codebooks, first.codebooks) for part in parts):
        return None
    if first.scheme.weight.vectors is not None and any(
        part.shape[-2] % first.scheme.weight.vectors.height for part in parts[:-1]
    ):
        return None
    orders = [part.column_order for part in parts]
    if any((o is None) != (orders[0] is None) for o in orders):
        return None
    if orders[0] is not None and any(not torch.equal(o, orders[0]) for o in orders[1:] if o is not None):
        return None
    if first.scheme.flattened:
        block = first.scheme.blocks[0][1]
        if any(part.shape[-2] * part.shape[-1] % block for part in parts[:-1]):
            return None
        return _joined(parts, first.scheme, -1)
    if first.scheme.whole_columns:
        return None
    for rows, _ in first.scheme.blocks if not first.scheme.scattered else ():
        if rows and any(part.shape[-2] % rows for part in parts[:-1]):
            return None
    blocks = tuple((rows or 1, columns) for rows, columns in first.scheme.blocks)
    return _joined([_per_row(part) for part in parts], replace(first.scheme, blocks=blocks), -2)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.dtype is b.dtype and torch.equal(a, b))


def _per_row(part: QuantizedTensor) -> QuantizedTensor:
    """Whole-axis row blocks spelled as one block for each row."""

    def rows(per_block: Tensor, level: int) -> Tensor:
        if part.scheme.blocks[level][0]:
            return per_block
        return per_block.expand(*per_block.shape[:-2], part.shape[-2], per_block.shape[-1])

    return replace(
        part,
        scales=tuple(rows(s, i) for i, s in enumerate(part.scales)),
        zeros=None if part.zeros is None else rows(part.zeros, 0),
        offsets=tuple(rows(o, i) for i, o in enumerate(part.offsets)),
    )


def _joined(parts: list[QuantizedTensor], scheme: Scheme, scale_axis: int) -> QuantizedTensor:
    first = parts[0]

    def join(tensors: list[Tensor], axis: int) -> Tensor:
        return torch.cat([t.contiguous() for t in tensors], axis)

    return replace(
        first,
        scheme=scheme,
        shape=(*first.shape[:-2], sum(part.shape[-2] for part in parts), first.shape[-1]),
        codes=join([part.codes for part in parts], -2),
        scales=tuple(join([part.scales[i] for part in parts], scale_axis) for i in range(len(first.scales))),
        zeros=None
        if first.zeros is None
        else join([part.zeros for part in parts if part.zeros is not None], scale_axis),
        offsets=tuple(
            join([part.offsets[i] for part in parts], scale_axis) for i in range(len(first.offsets))
        ),
        origin=", ".join(part.origin for part in parts),
        row_groups=_joined_groups(parts) if scheme.scattered else None,
        outliers=None if scheme.outliers is None else _joined_outliers(parts),
    )


def _joined_outliers(parts: list[QuantizedTensor]) -> Outliers:
    """Each part's below those of the parts before it."""
    found = [part.outliers for part in parts if part.outliers is not None]
    assert len(found) == len(parts), "their schemes have outliers"
    counts = torch.cat([outliers.starts.diff() for outliers in found])
    return Outliers(_starts(counts), torch.cat([outliers.entries for outliers in found]))


def _joined_groups(parts: list[QuantizedTensor]) -> Tensor:
    """Each part's groups behind those of the parts before it."""
    level = next(i for i, (rows, _) in enumerate(parts[0].scheme.blocks) if rows > 1)
    found, first = [], 0
    for part in parts:
        assert part.row_groups is not None, "its scheme is scattered"
        found.append(part.row_groups + first)
        first += part.scales[level].shape[-2]
    return torch.cat(found)
