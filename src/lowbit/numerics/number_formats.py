"""Number formats: what a stored code of 1 to 8 bits (or a whole block of bytes) is worth.

One table, indexed by readers, kernels, quantizers and tests alike. A scalar format maps each code to a
value; integer formats are *offset binary* (value = code - 2^(bits-1)) when signed and plain when not, so
that "unsigned with a zero point of 2^(bits-1) everywhere" and "signed without a zero point" share codes.
A block format (GGUF) has no scalar table: its bytes decode a block at a time through a ``BlockLayout``. Nor
has a format of codebooks, whose codes are indices of vectors of several weights: of a row or some
(``VectorLayout``), of a column (``RowVectorLayout``); or one of trellises, whose weights share their bits
(``TrellisLayout``), or of a lattice's vectors between transforms (``LatticeLayout``).

Sources: OCP Microscaling Formats v1.0 (e2m1, e2m3, e3m2, e8m0), "FP8 Formats for Deep Learning"
(Micikevicius et al., 2022: e4m3, e5m2), QLoRA (Dettmers et al., 2023: nf4).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.lattice import LatticeLayout
from lowbit.numerics.trellis import MULTIPLIERS, TrellisLayout


@dataclass(frozen=True)
class BlockLayout:
    """A GGUF-like block: ``weights`` elements along *in* in ``bytes`` bytes.

    ``decode`` maps uint8 (..., blocks, bytes) to float32 (..., blocks, weights), the exact value of each
    element; ``expand`` maps the same bytes to small codes, scales and offsets (see ``Expanded``).
    """

    weights: int
    bytes: int
    decode: Callable[[Tensor], Tensor] = field(compare=False)
    expand: Callable[[Tensor], Expanded] = field(compare=False)


@dataclass(frozen=True)
class Expanded:
    """A block format taken apart: value = code_value * prod(scales) + prod(offsets).

    ``codes`` uint8 (..., blocks, weights) in ``number_format``; scale and offset level i is float32
    (..., blocks, weights / columns[i]), inner level first. ``offsets`` is empty or has as many levels.
    """

    number_format: str
    codes: Tensor
    columns: tuple[int, ...]
    scales: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class VectorLayout:
    """Indices of vectors of ``length`` neighbouring columns, in each of ``height`` rows, in ``books``
    codebooks of 2^``bits`` each: a weight is the sum of what they say.

    ``height`` rows are stored as bytes: vector by vector an index into each codebook, of one byte, or of two,
    low byte first, where ``bits`` are more than 8. A vector's numbers lie row by row.
    """

    books: int
    bits: int
    length: int
    height: int = 1

    @property
    def name(self) -> str:
        """Of the number format: "vq2x8_8", or "vq1x12_4x2" with vectors of 4 rows."""
        rows = f"{self.height}x" if self.height > 1 else ""
        return f"vq{self.books}x{self.bits}_{rows}{self.length}"

    @property
    def index_bytes(self) -> int:
        """Of an index."""
        return 1 if self.bits <= 8 else 2

    def column_unit(self, columns: int) -> int:
        """So many neighbouring columns stay together."""
        return self.length

    def row_bytes(self, columns: int) -> int:
        """Of ``height`` rows."""
        return columns // self.length * self.books * self.index_bytes

    def indices(self, codes: Tensor) -> Tensor:
        """uint8 (..., bytes) -> int32 (..., vectors, books)."""
        wide = codes.int().unflatten(-1, (-1, self.books, self.index_bytes))
        return wide[..., 0] if self.index_bytes == 1 else wide[..., 0] | wide[..., 1] << 8

    def decode(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """uint8 (..., out / height, bytes), (books, 2^bits, height * length) -> float32 (..., out, in),
        codebook by codebook."""
        indices = self.indices(codes)
        total = codebooks[0].float()[indices[..., 0]]
        for book in range(1, self.books):
            total += codebooks[book].float()[indices[..., book]]
        if self.height > 1:
            total = total.unflatten(-1, (self.height, self.length)).transpose(-3, -2).flatten(-4, -3)
        return total.flatten(-2)


@dataclass(frozen=True)
class RowVectorLayout:
    """Indices of vectors of ``length`` neighbouring rows of a column (VPTQ): a weight is a number of the
    vector that an index names, or the sum of two, of ``centroids`` and of ``residual`` (0: none) vectors.

    Stored columns are ``outliers``, whose numbers are kept as they are, then ``books`` times ``width`` that
    share codebooks; ``width`` is 0 where all columns share one and there are no outliers. ``dtype``: of the
    numbers. ``length`` rows are stored as bytes: the outliers' numbers, column by column, then for each other
    column its index and that of the residual codebook, of as many bytes as it needs, the lowest first.
    """

    length: int
    centroids: int
    residual: int = 0
    dtype: str = "f16"
    books: int = 1
    width: int = 0
    outliers: int = 0

    def __post_init__(self) -> None:
        assert bool(self.width) == (self.books > 1 or self.outliers > 0), "a width where columns differ"

    @property
    def name(self) -> str:
        """Of the number format: "rvq8_65536+256_f16"."""
        second = f"+{self.residual}" if self.residual else ""
        parts = f"_{self.books}x{self.width}" if self.width else ""
        outliers = f"_out{self.outliers}" if self.outliers else ""
        return f"rvq{self.length}_{self.centroids}{second}_{self.dtype}{parts}{outliers}"

    @property
    def columns(self) -> int:
        """Of the weight; 0: any number."""
        return self.outliers + self.books * self.width

    @property
    def height(self) -> int:
        """Rows that are stored together."""
        return self.length

    @property
    def index_bytes(self) -> tuple[int, int]:
        """Of an index, and of one of the residual codebook."""
        main, second = (
            max(1, -(-(count - 1).bit_length() // 8)) for count in (self.centroids, self.residual)
        )
        return main, second if self.residual else 0

    @property
    def outlier_bytes(self) -> int:
        """Of the outliers' numbers in ``length`` rows."""
        return self.outliers * self.length * int(number_format(self.dtype).bits) // 8

    @property
    def bits(self) -> float:
        """Bits a weight as they are stored."""
        columns = self.columns or 1
        return 8 * self.row_bytes(columns) / (columns * self.length)

    def column_unit(self, columns: int) -> int:
        """So many neighbouring columns stay together, but for what ``part`` has."""
        return columns if self.width else 1

    def books_of(self, start: int, stop: int) -> tuple[range, int]:
        """Which codebooks stored columns ``start:stop`` have, and how many columns there are of each: whole
        ones, or some of one. No books where neither is so."""
        first, last = max(start - self.outliers, 0), stop - self.outliers
        width = self.width or last
        books = range(first // width, -(-last // width))
        if len(books) == 1:
            return books, last - first
        return (range(0), 0) if first % width or last % width else (books, width)

    def part(self, start: int, stop: int) -> RowVectorLayout | None:
        """Of stored columns ``start:stop`` alone; None where ``books_of`` has no books."""
        books, width = self.books_of(start, stop)
        outliers = max(0, min(stop, self.outliers) - start)
        parted = outliers > 0 or len(books) > 1
        return replace(self, books=len(books), width=width * parted, outliers=outliers) if books else None

    def borders(self, ranks: int) -> list[int] | None:
        """Where stored columns are cut for so many ranks: whole codebooks, one more for the first ranks where
        they do not divide, or where there are fewer than ranks some columns of one for each. The first rank
        has the outliers. None where there are too few columns."""
        each, more = divmod(ranks, self.books)
        if not each:
            each, more = divmod(self.books, ranks)
            ends = [(rank * each + min(rank, more)) * self.width for rank in range(1, ranks + 1)]
        else:
            ends = []
            for book in range(self.books):
                sharers = each + (book < more)
                unit = 32 if self.width >= 32 * sharers else 1  # of which kernels make tiles
                units = self.width // unit
                ends += [book * self.width + units * n // sharers * unit for n in range(1, sharers)]
                ends.append((book + 1) * self.width)
        borders = [0, *(self.outliers + end for end in ends)]
        return borders if all(a < b for a, b in pairwise([self.outliers, *borders[1:]])) else None

    def row_bytes(self, columns: int) -> int:
        """Of ``length`` rows."""
        return self.outlier_bytes + (columns - self.outliers) * sum(self.index_bytes)

    def cut(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """uint8 (vectors, bytes) of all columns -> of stored columns ``start:stop``."""
        numbers, index = self.outlier_bytes, sum(self.index_bytes)
        of_outlier = numbers // self.outliers if self.outliers else 0
        kept = slice(min(start, self.outliers) * of_outlier, min(stop, self.outliers) * of_outlier)
        first, last = (numbers + max(at - self.outliers, 0) * index for at in (start, stop))
        return torch.cat((codes[:, kept], codes[:, first:last]), 1) if self.outliers else codes[:, first:last]

    def indices(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (vectors, bytes) -> int32 (vectors, columns without outliers): both codebooks' indices."""
        main, second = self.index_bytes
        cells = codes[:, self.outlier_bytes :].int().unflatten(-1, (-1, main + second))

        def number(first: int, count: int) -> Tensor:
            shifts = 8 * torch.arange(count, dtype=torch.int32)
            return (cells[..., first : first + count] << shifts).sum(-1, dtype=torch.int32)

        return number(0, main), number(main, second) if second else None

    def outlier_numbers(self, codes: Tensor) -> Tensor:
        """uint8 (vectors, bytes) -> (vectors, outliers, length) in ``dtype``."""
        dtype = number_format(self.dtype).dtype
        assert dtype is not None, "that of floats"
        stored = codes[:, : self.outlier_bytes].clone(memory_format=torch.contiguous_format)
        return stored.flatten().view(dtype).view(len(codes), self.outliers, self.length)

    def decode(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """uint8 (vectors, bytes), (books, centroids + residual, length) -> float32 (rows, columns)."""
        main, second = self.indices(codes)
        columns = main.shape[1]
        values = torch.empty(len(codes), self.outliers + columns, self.length)
        values[:, : self.outliers] = self.outlier_numbers(codes).float()
        width = self.width or columns
        for book in range(self.books):
            here = slice(book * width, (book + 1) * width)
            part = codebooks[book].float()[main[:, here]]
            if second is not None:
                part += codebooks[book].float()[self.centroids + second[:, here]]
            values[:, self.outliers + here.start : self.outliers + here.stop] = part
        return values.transpose(1, 2).reshape(-1, values.shape[1])


@dataclass(frozen=True)
class NumberFormat:
    """``bits`` a weight; ``values[code]`` a code's worth, NaN for none; or a ``block``, ``vectors``, a
    ``trellis`` or a ``lattice``."""

    name: str
    bits: float
    values: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    dtype: torch.dtype | None = field(default=None, compare=False)  # the torch dtype of the same bytes
    block: BlockLayout | None = field(default=None, repr=False, compare=False)
    vectors: VectorLayout | RowVectorLayout | None = field(default=None, repr=False, compare=False)
    trellis: TrellisLayout | None = field(default=None, repr=False, compare=False)
    lattice: LatticeLayout | None = field(default=None, repr=False, compare=False)

    @property
    def is_tall(self) -> bool:
        """Whether several rows are stored together, which nothing cuts: they are decoded before."""
        return self.lattice is not None or (self.vectors is not None and self.vectors.height > 1)

    @property
    def in_bytes(self) -> bool:
        """Whether codes are kept as a row's bytes, which mean several columns together."""
        return any(layout is not None for layout in (self.block, self.vectors, self.trellis, self.lattice))

    @property
    def is_integer(self) -> bool:
        return self.name.startswith(("int", "uint"))

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 (2^bits,): the value of every code."""
        if self.values is None:
            raise LowbitError("E0701", f"number format {self.name} has no table of scalar values")
        return torch.tensor(self.values, dtype=torch.float32, device=device)


def _small_float(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, ...]:
    """All codes of a sign/exponent/mantissa format without specials, sign in the top bit."""
    magnitudes = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            magnitudes.append(math.ldexp(mantissa, 1 - bias - mantissa_bits))
        else:
            magnitudes.append(math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits))
    return tuple(magnitudes) + tuple(-value for value in magnitudes)


def _with_nan(values: tuple[float, ...], *codes: int) -> tuple[float, ...]:
    listed = list(values)
    for code in codes:
        listed[code] = math.nan
    return tuple(listed)


def _e5m2() -> tuple[float, ...]:
    values = list(_small_float(5, 2, 15))
    values[0x7C], values[0xFC] = math.inf, -math.inf
    return _with_nan(tuple(values), 0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF)


def _fnuz(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, ...]:
    return _with_nan(_small_float(exponent_bits, mantissa_bits, bias), 0x80)


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BNB_FP4_HALF = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
)  # fmt: skip
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _build() -> dict[str, NumberFormat]:
    formats = [
        NumberFormat(f"uint{bits}", bits, tuple(float(c) for c in range(1 << bits))) for bits in range(1, 9)
    ] + [
        NumberFormat(f"int{bits}", bits, tuple(float(c - (1 << bits - 1)) for c in range(1 << bits)))
        for bits in range(1, 9)
    ]
    formats += [
        NumberFormat("binary", 1, (-1.0, 1.0)),
        NumberFormat("ternary", 2, (-1.0, 0.0, 1.0, 2.0)),  # code - 1; good files never use 3
        NumberFormat("e2m1", 4, _small_float(2, 1, 1)),
        NumberFormat("e2m3", 6, _small_float(2, 3, 1)),
        NumberFormat("e3m2", 6, _small_float(3, 2, 3)),
        NumberFormat("e4m3", 8, _with_nan(_small_float(4, 3, 7), 0x7F, 0xFF), torch.float8_e4m3fn),
        NumberFormat("e4m3fnuz", 8, _fnuz(4, 3, 8), torch.float8_e4m3fnuz),
        NumberFormat("e5m2", 8, _e5m2(), torch.float8_e5m2),
        NumberFormat("e5m2fnuz", 8, _fnuz(5, 2, 16), torch.float8_e5m2fnuz),
        NumberFormat(
            "e8m0",
            8,
            _with_nan(tuple(2.0 ** (code - 127) for code in range(256)), 0xFF),
            torch.float8_e8m0fnu,
        ),
        NumberFormat("nf4", 4, _NF4),
        NumberFormat("fp4_bnb", 4, _BNB_FP4_HALF + tuple(-v for v in _BNB_FP4_HALF)),
        NumberFormat("iq4_nl_codes", 4, tuple(float(v) for v in _IQ4_NL)),
        NumberFormat("f16", 16, None, torch.float16),
        NumberFormat("bf16", 16, None, torch.bfloat16),
        NumberFormat("f32", 32, None, torch.float32),
    ]
    return {number_format.name: number_format for number_format in formats}


NUMBER_FORMATS: dict[str, NumberFormat] = _build()


_VECTORS = re.compile(
    r"vq(?P<books>[1-9]\d{0,3})x(?P<bits>[1-9]|1[0-6])_((?P<height>[2-9]|[1-9]\d{1,3})x)?(?P<length>[1-9]\d{0,3})"
)
_ROW_VECTORS = re.compile(
    r"rvq(?P<length>[1-9]\d{0,3})_(?P<centroids>[1-9]\d{0,6})(\+(?P<residual>[1-9]\d{0,6}))?"
    r"_(?P<dtype>f16|bf16|f32)(_(?P<books>[1-9]\d{0,4})x(?P<width>[1-9]\d{0,6}))?(_out(?P<outliers>[1-9]\d{0,6}))?"
)


def vector_format(books: int, bits: int, length: int, height: int = 1) -> NumberFormat:
    """Sums of ``books`` vectors of ``height`` rows by ``length`` columns, each one of 2^``bits``."""
    return number_format(VectorLayout(books, bits, length, height).name)


_LATTICE = re.compile(r"e8p(\+(?P<book>e8p?)/(?P<divisor>[0-9.e+-]+))?")
_TRELLIS = re.compile(rf"trellis([1-8])_({'|'.join(MULTIPLIERS)})(?:_from([1-9]\d?|1[01]\d|12[0-7]))?")


def trellis_format(bits: int, book: str) -> NumberFormat:
    """Trellises of ``bits`` bits a weight with the numbers of a code book: "trellis4_mcg"."""
    return number_format(f"trellis{bits}_{book}")


def number_format(name: str) -> NumberFormat:
    """The format called ``name``; GGUF's block formats are ``gguf_q4_0`` and so on, codebooks ``vq2x8_8`` or,
    of vectors of rows, ``rvq8_65536+256_f16``, trellises ``trellis4_mcg``, lattices ``e8p``."""
    if name not in NUMBER_FORMATS and (points := _LATTICE.fullmatch(name)):
        lattice = LatticeLayout(float(points["divisor"] or 0), 8 if points["book"] == "e8" else 16)
        NUMBER_FORMATS[name] = NumberFormat(name, lattice.bits, lattice=lattice)
    if name not in NUMBER_FORMATS and (coded := _TRELLIS.fullmatch(name)):
        trellis = TrellisLayout(int(coded[1]), coded[2], int(coded[3] or 0))
        NUMBER_FORMATS[name] = NumberFormat(name, trellis.bits, trellis=trellis)
    if name not in NUMBER_FORMATS and (found := _VECTORS.fullmatch(name)):
        layout = VectorLayout(**{key: int(value or 1) for key, value in found.groupdict().items()})
        bits = 8 * layout.books * layout.index_bytes / (layout.length * layout.height)  # as they are stored
        NUMBER_FORMATS[name] = NumberFormat(name, bits, vectors=layout)
    if name not in NUMBER_FORMATS and (found := _ROW_VECTORS.fullmatch(name)):
        said = {key: value for key, value in found.groupdict().items() if value is not None}
        sizes = {key: int(value) for key, value in said.items() if key != "dtype"}
        rows = RowVectorLayout(dtype=said["dtype"], **sizes)
        NUMBER_FORMATS[name] = NumberFormat(name, rows.bits, vectors=rows)
    if name.startswith("gguf_") and name not in NUMBER_FORMATS:
        from lowbit.numerics.block_layouts import block_formats

        NUMBER_FORMATS.update(block_formats())
    try:
        return NUMBER_FORMATS[name]
    except KeyError:
        known = ", ".join(sorted(NUMBER_FORMATS))
        raise LowbitError("E0701", f"unknown number format {name!r}; known: {known}") from None


def nearest_code(values: Tensor, fmt: NumberFormat) -> Tensor:
    """uint8 codes of the nearest value, saturating; zero always gets the code of +0.

    ``values`` float (...). Integer and small float formats break ties to the even code (IEEE), lookup
    tables (nf4) to the lower value (bitsandbytes).
    """
    if fmt.is_integer:
        low = -(1 << int(fmt.bits) - 1) if fmt.name.startswith("int") else 0
        high = low + (1 << int(fmt.bits)) - 1
        return (values.float().round().clamp(low, high) - low).to(torch.uint8)
    if fmt.dtype is not None and fmt.name in ("e4m3", "e5m2"):
        limit = torch.finfo(fmt.dtype).max
        return values.float().clamp(-limit, limit).to(fmt.dtype).view(torch.uint8)
    pairs: dict[float, int] = {}
    for code, value in enumerate(fmt.values or ()):
        if math.isfinite(value):
            pairs.setdefault(value, code)  # -0.0 == 0.0: the first code, +0, stays
    table = torch.tensor(sorted(pairs), dtype=torch.float64, device=values.device)
    codes = torch.tensor([pairs[value] for value in sorted(pairs)], device=values.device)
    middles = (table[1:] + table[:-1]) / 2
    wide = values.double()
    nearest = torch.bucketize(wide, middles)  # a tie goes to the lower neighbour
    if fmt.name.startswith("e"):
        tie = wide == middles[nearest.clamp(max=middles.numel() - 1)]
        nearest = nearest + (tie & (codes[nearest] % 2 == 1)).long()
    return codes[nearest].to(torch.uint8)
