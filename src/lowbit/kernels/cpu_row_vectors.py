"""cpu_row_vectors: indices of vectors that run down a column (VPTQ), packed as they are.

Each book's numbers become whole ones of 16 bits over a factor of its own, and so do the outliers', a few
columns that are kept number by number. Factor and scale of a column go into x, which then becomes whole
numbers of 15 bits with a scale for each 32 columns: products and their sums over 32 columns are exact in 32
bits, what follows is float32. With w a number, s the scale and b the offset of a column,

    sum over c of (w[r, c] s[c] + b[c]) x[c] = sum of w[r, c] (s[c] x[c]) + sum of b[c] x[c]

The second sum is float32 and the same for all rows. The factor is the least with which no 32 columns of any
row of the weight can pass 32 bits, or the power of two above it where that makes every number exact. A weight
is then off by at most half of it for each codebook: of normal numbers about 2^-12 of their deviation. With
x's own rounding that is less than a quarter of what bfloat16 costs the inputs of other formats. Rows that
are looked up have the same numbers.

    buffers   data         blocks of 16 rows (12 of vectors of 3, 6 or 12; csrc/linear_row_vectors.h)
              table        int16 (books, centroids + residual, 4, 8 or 16)
              factors      float32 (1 + books,): the outliers', and each book's
              inputs       int32 (columns,): which of x's a stored column multiplies, -1 where it pads a tile
              multiplier   float32 (columns,): scale times factor
              offset       float32 (columns,): what is added, where there is something

Codebooks are a weight's own: parts of a layer that have each their own are not fused, and x is laid out anew
for each.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.kernels import packed_linear, row_vector_rules
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import CODES, COLUMNS, ROWS, Description, NativeWeight
from lowbit.kernels.whole_numbers import LARGEST_SUM, LARGEST_WORD, factor_from, in_words
from lowbit.numerics.number_formats import RowVectorLayout, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_LENGTHS = range(3, ROWS + 1)  # rows of a vector: of fewer, most of a register would be empty
_LEAST_TABLE = 64  # numbers that the native code reads of any table
_SLICE = 1 << 22  # weights that are looked at together


class _Description(ctypes.Structure):
    """lowbit_row_vectors of csrc/linear_layout.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("order", "multiplier", "offset")),
        *((name, ctypes.c_int32) for name in ("length", "books", "centroids", "residual", "outlier_tiles")),
    )


@dataclass(frozen=True)
class RowVectorsWeight(NativeWeight):
    """A NativeWeight with what its description points at."""

    columns_description: _Description = field(default_factory=_Description, repr=False)


@dataclass(frozen=True)
class _Sizes:
    """``RowVectors`` and ``Layout`` of csrc/linear_layout.h."""

    layout: RowVectorLayout
    rows: int
    columns: int  # the weight's own

    @property
    def stride(self) -> int:
        """Numbers of a vector in the table."""
        return 4 if self.layout.length <= 4 else 8 if self.layout.length <= 8 else 16

    @property
    def pieces(self) -> int:
        """Vectors of a column of a block."""
        return ROWS // self.stride

    @property
    def height(self) -> int:
        """Rows of a block."""
        return self.pieces * self.layout.length

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.height)

    @property
    def width(self) -> int:
        """Columns of a book."""
        return self.layout.width or self.columns

    @property
    def book_tiles(self) -> int:
        return -(-self.width // COLUMNS)

    @property
    def outlier_tiles(self) -> int:
        return -(-self.layout.outliers // COLUMNS)

    @property
    def padded(self) -> int:
        """Columns of whole tiles."""
        return (self.outlier_tiles + self.layout.books * self.book_tiles) * COLUMNS

    @property
    def word_bytes(self) -> int:
        """Of a block's outliers."""
        return self.outlier_tiles * ROWS * COLUMNS * 2

    @property
    def tile_bytes(self) -> int:
        """Of a tile of indices."""
        return COLUMNS * self.pieces * sum(self.layout.index_bytes)

    @property
    def block_bytes(self) -> int:
        return self.word_bytes + self.layout.books * self.book_tiles * self.tile_bytes

    @property
    def table_shape(self) -> tuple[int, int, int]:
        return self.layout.books, self.layout.centroids + self.layout.residual, self.stride

    def padded_columns(self, of: Tensor, filler: float) -> Tensor:
        """(columns,) -> (padded,): ``filler`` behind the outliers and behind each book."""
        outliers = self.layout.outliers
        first = pad(of[:outliers], (0, -outliers % COLUMNS), value=filler)
        books = of[outliers:].view(self.layout.books, self.width)
        return torch.cat((first, pad(books, (0, -self.width % COLUMNS), value=filler).flatten()))

    def of_columns(self, of: Tensor) -> Tensor:
        """(1 + books,), that of the outliers first, -> (columns,)."""
        counts = torch.tensor([self.layout.outliers, *[self.width] * self.layout.books])
        return of.repeat_interleave(counts)

    def own_columns(self, padded: Tensor) -> Tensor:
        """The inverse of ``padded_columns``."""
        first = self.outlier_tiles * COLUMNS
        books = padded[first:].view(self.layout.books, -1)[:, : self.width]
        return torch.cat((padded[: self.layout.outliers], books.flatten()))


def _layout(scheme: Scheme) -> RowVectorLayout:
    layout = scheme.weight.vectors
    assert isinstance(layout, RowVectorLayout), "refuses() was asked first"
    return layout


def _sizes(scheme: Scheme, shape: tuple[int, ...]) -> _Sizes:
    return _Sizes(_layout(scheme), shape[0], shape[1])


class CpuRowVectors(NativeKernel):
    """See the module docstring."""

    name = "cpu_row_vectors"
    layout = 1

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        return row_vector_rules.unfit(scheme, shape[1], _LENGTHS)

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of indices and outliers, and of the columns' numbers."""
        sizes = _sizes(scheme, shape)
        return sizes.blocks * sizes.block_bytes + sizes.padded * (12 if scheme.offset else 8)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Indices in tiles, codebooks and outliers as whole numbers, the columns' numbers beside them."""
        sizes, codebooks = _sizes(weight.scheme, weight.shape), weight.codebooks
        assert codebooks is not None, "refuses() was asked first"
        layout = sizes.layout
        most = _extremes(weight, sizes)
        outliers, factors = layout.outlier_numbers(weight.codes), torch.ones(1 + layout.books)
        if layout.outliers:
            factors[0] = _factor(outliers, 1, *most[0])
        table = torch.zeros(sizes.table_shape, dtype=torch.int16)
        for book, numbers in enumerate(codebooks):
            factors[1 + book] = _factor(numbers, 2 if layout.residual else 1, *most[1 + book])
            table[book, :, : layout.length] = in_words(numbers, float(factors[1 + book]))
        multiplier = sizes.of_columns(factors)
        if weight.scales:
            multiplier = multiplier * weight.scales[0][0].float()
        order = torch.arange(weight.shape[1]) if weight.column_order is None else weight.column_order
        buffers = {
            "data": _tiles(weight.codes, in_words(outliers, float(factors[0])), sizes),
            "table": pad(table.flatten(), (0, max(0, _LEAST_TABLE - table.numel()))),
            "factors": factors,
            "inputs": sizes.padded_columns(order.to(torch.int32), -1),
            "multiplier": sizes.padded_columns(multiplier, 0.0),
        }
        if weight.offsets:
            buffers["offset"] = sizes.padded_columns(weight.offsets[0][0].float(), 0.0)
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        self.check(scheme, shape, origin)
        sizes = _sizes(scheme, shape)
        padded = ((sizes.padded,), torch.float32)
        wanted = {
            "data": ((sizes.blocks * sizes.block_bytes,), torch.uint8),
            "table": ((max(_LEAST_TABLE, math.prod(sizes.table_shape)),), torch.int16),
            "factors": ((1 + sizes.layout.books,), torch.float32),
            "inputs": ((sizes.padded,), torch.int32),
            "multiplier": padded,
        }
        packed_linear.check_buffers(buffers, wanted | ({"offset": padded} if scheme.offset else {}), origin)
        columns = sizes.own_columns(inputs := buffers["inputs"].long())
        packed_linear.check_order(columns, shape[1], origin)
        if not torch.equal(inputs, sizes.padded_columns(columns, -1)):
            raise ValueError(f"{origin}: columns that pad tiles are taken from x")
        layout, offset = sizes.layout, buffers.get("offset")
        described = _Description(
            buffers["inputs"].data_ptr(),
            buffers["multiplier"].data_ptr(),
            None if offset is None else offset.data_ptr(),
            *(layout.length, layout.books, layout.centroids, layout.residual, sizes.outlier_tiles),
        )
        description = Description.plain((shape[0], sizes.padded), CODES["row_vectors"])
        description.data, description.table = buffers["data"].data_ptr(), buffers["table"].data_ptr()
        description.row_vectors = ctypes.addressof(described)
        packed = RowVectorsWeight(
            self,
            scheme,
            shape,
            buffers,
            origin,
            description,
            ctypes.addressof(description),
            shape[1],
            height=sizes.height,
            columns_description=described,
        )
        _check_indices(packed, sizes)
        return packed

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again, with the numbers that are multiplied."""
        assert isinstance(packed, RowVectorsWeight), "packed by this kernel"
        sizes, scheme, buffers = _sizes(packed.scheme, packed.shape), packed.scheme, packed.buffers
        layout, factors, offset = sizes.layout, buffers["factors"], buffers.get("offset")
        table = buffers["table"][: math.prod(sizes.table_shape)].view(sizes.table_shape)
        inputs = sizes.own_columns(buffers["inputs"]).long()
        scale = sizes.own_columns(buffers["multiplier"]) / sizes.of_columns(factors)
        dtype = scheme.scales[0].dtype if scheme.scales else None
        return QuantizedTensor(
            scheme,
            packed.shape,
            _codes(packed, sizes),
            () if dtype is None else (scale.to(dtype).unsqueeze(0),),
            offsets=() if offset is None else (sizes.own_columns(offset).to(dtype).unsqueeze(0),),
            column_order=inputs if scheme.reordered else None,
            origin=packed.origin,
            codebooks=table[..., : layout.length].float() * factors[1:].view(-1, 1, 1),
        )


def _extremes(weight: QuantizedTensor, sizes: _Sizes) -> list[tuple[float, float]]:
    """Of the outliers and of each book: the largest sum of |w| over 32 columns of a row; the largest |w|."""
    layout, codebooks = sizes.layout, weight.codebooks
    assert codebooks is not None, "refuses() was asked first"
    found = torch.zeros(1 + layout.books, 2)
    step = max(1, _SLICE // (layout.length * sizes.columns))
    for start in range(0, len(weight.codes), step):
        values = layout.decode(weight.codes[start : start + step], codebooks)
        values = values[: sizes.rows - start * layout.length].abs()
        parts = (values[:, : layout.outliers], *values[:, layout.outliers :].split(sizes.width, 1))
        for number, part in enumerate(parts):
            if part.shape[1]:
                sums = pad(part, (0, -part.shape[1] % COLUMNS)).unflatten(1, (-1, COLUMNS)).sum(-1)
                found[number] = torch.maximum(found[number], torch.stack((sums.max(), part.max())))
    return [(float(sums), float(size)) for sums, size in found]


def _factor(numbers: Tensor, terms: int, largest_sum: float, largest: float) -> float:
    """What whole numbers are multiplied with to be worth ``numbers``; a weight is a sum of ``terms`` of them.

    A row's 32 columns times x of 15 bits fit int32; numbers and weights fit int16.
    """
    half = terms / 2  # each is rounded
    room = LARGEST_SUM - COLUMNS * half
    own = max(largest, float(numbers.abs().max()))
    least = 1.00001 * max(largest_sum / room, own / (LARGEST_WORD - half))  # sums were float32
    return factor_from(least, numbers)


def _tiles(codes: Tensor, outliers: Tensor, sizes: _Sizes) -> Tensor:
    """uint8: blocks. ``codes`` (vectors, bytes), ``outliers`` int16 (vectors, columns, length)."""
    layout, blocks = sizes.layout, sizes.blocks
    more = blocks * sizes.pieces - len(codes)
    words = pad(outliers, (0, sizes.stride - layout.length, 0, -layout.outliers % COLUMNS, 0, more)).view(
        blocks, sizes.pieces, sizes.outlier_tiles, COLUMNS // 2, 2, sizes.stride
    )
    # (blocks, tiles, pairs, pieces, lanes, column of the pair)
    words = words.permute(0, 2, 3, 1, 5, 4).flatten().view(torch.uint8).view(blocks, sizes.word_bytes)
    main, _ = layout.index_bytes
    cells = codes[:, layout.outlier_bytes :].view(len(codes), layout.books, sizes.width, -1)
    cells = pad(cells, (0, 0, 0, -sizes.width % COLUMNS, 0, 0, 0, more))
    cells = cells.view(blocks, sizes.pieces, layout.books, sizes.book_tiles, COLUMNS, -1)
    cells = cells.permute(0, 2, 3, 4, 1, 5)  # (blocks, books, tiles, columns, pieces, bytes)
    parts = (cells[..., :main].flatten(3), cells[..., main:].flatten(3))
    return torch.cat((words, torch.cat(parts, -1).reshape(blocks, -1)), 1).flatten()


def _index_cells(packed: NativeWeight, sizes: _Sizes) -> Tensor:
    """uint8 (blocks, pieces, books, columns of whole tiles, bytes): the indices of ``_tiles``."""
    layout, main = sizes.layout, sizes.layout.index_bytes[0]
    data = packed.buffers["data"].view(sizes.blocks, -1)[:, sizes.word_bytes :]
    tiles = data.reshape(sizes.blocks, layout.books, sizes.book_tiles, -1)
    first = COLUMNS * sizes.pieces * main
    parts = (
        tiles[..., at].unflatten(-1, (COLUMNS, sizes.pieces, -1))
        for at in (slice(0, first), slice(first, None))
        if tiles[..., at].shape[-1]
    )
    return torch.cat(list(parts), -1).flatten(2, 3).permute(0, 3, 1, 2, 4)


def _codes(packed: NativeWeight, sizes: _Sizes) -> Tensor:
    """uint8 (vectors, bytes): the inverse of ``_tiles``, outliers as floats again."""
    layout, factor = sizes.layout, packed.buffers["factors"][0]
    count = -(-sizes.rows // layout.length)
    cells = _index_cells(packed, sizes).flatten(0, 1)[:count, :, : sizes.width]
    indices = cells.reshape(count, -1)
    data = packed.buffers["data"].view(sizes.blocks, -1)[:, : sizes.word_bytes]
    shape = (sizes.blocks, sizes.outlier_tiles, COLUMNS // 2, sizes.pieces, sizes.stride, 2)
    words = data.flatten().view(torch.int16).view(shape).permute(0, 3, 1, 2, 5, 4)
    lanes = (sizes.blocks * sizes.pieces, sizes.outlier_tiles * COLUMNS, sizes.stride)
    words = words.reshape(lanes)[:count, : layout.outliers]
    numbers = (words[..., : layout.length].float() * factor).to(number_format(layout.dtype).dtype)
    stored = numbers.flatten().view(torch.uint8).view(count, layout.outlier_bytes)
    return torch.cat((stored, indices), 1)


def _check_indices(packed: NativeWeight, sizes: _Sizes) -> None:
    """ValueError where an index is past its codebook; of as many as an index can say none is."""
    layout = sizes.layout
    counts = [(layout.centroids, layout.index_bytes[0]), (layout.residual, layout.index_bytes[1])]
    if all(count == 1 << 8 * size for count, size in counts if size):
        return
    cells = _index_cells(packed, sizes).flatten(0, 1).flatten(1, 2)
    main, second = replace(layout, books=1, width=0, outliers=0).indices(cells.flatten(1))
    for count, index in ((layout.centroids, main), (layout.residual, second)):
        if index is not None and int(index.max()) >= count:
            raise ValueError(f"{packed.origin}: index {int(index.max())} of a codebook of {count} vectors")
