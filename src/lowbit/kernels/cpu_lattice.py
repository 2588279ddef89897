"""cpu_lattice: vectors of the lattice E8 (QuIP#) as files hold them, 16 bits for eight weights.

With u the vectors and H_n the Hadamard matrix of order n (``numerics.lattice``):

    y = outputs * (H_out (u (H_in^T (inputs * x))))

Both transforms are float32 (``rotation``); between them is a product with u, whose tiles are those of a grid
(csrc/linear_grids.h): a byte says which of 256 vectors of 1/2, 3/2 and 5/2 it is, another has their signs,
and where its count is odd a quarter is subtracted, else added. With the signs of all 3/2 turned round, a
vector's count is even whatever its sum; the first number's sign is turned where a quarter is subtracted. Four
times a number is one of 12 whole ones, and the transformed x becomes whole numbers of 16 bits with a scale
for each 32 columns (csrc/linear_words.h): sums of 32 columns are exact, and x loses a fiftieth of what
bfloat16 would cost it.

Where there are two codes for a vector, the second one's numbers count as b of the first one's a, QuIP#'s over
3.45 as 20 of 69; a times the one plus b times the other is a whole number of 12 bits. A tile of each book
lies behind the other, and their numbers are added before x meets them. Of a divisor that is no small
fraction the second book's numbers are columns behind the first's, under a scale of their own: x lies there
twice.

Ranks have some of u's rows each, and a weight without ``outputs``: what all of them give is gathered and
transformed then (``layers.linear.Gathered``). Its bits are those of one process.

    buffers   data           tiles of 16 rows by 32 columns, two in turns where numbers are added; else all of
                             a book's behind 16 float32 scales
              table          16 numbers, of two books of each, and the words of 256 vectors
              outputs        float32 (out, 1), where y is transformed
              inputs         float32 (1, in)
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.grid_codes import low_and_high_bytes
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import CODES, COLUMNS, ROWS, SCALES_F32, Description
from lowbit.kernels.transformed_kernel import TransformedKernel
from lowbit.numerics.hadamard import hadamard_factors
from lowbit.numerics.lattice import LENGTH, LatticeLayout, e8p, transform
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme

_UNIT = 2 * COLUMNS  # columns that files have together
_HEAD = ROWS * 4  # bytes of scales
_INDICES = ROWS * COLUMNS // LENGTH  # bytes of a tile, and as many of signs
LARGEST_NUMBER = 11  # four times the largest of a vector's numbers
LARGEST_OF_PAIR = 2047  # of two, in csrc/linear_words.h
# Where a vector's signs stand in the word of its row (``parity_place`` of csrc/linear_grids.h).
_SIGN_PLACES = (0, 1, 8, 9, 4, 5, 12, 13)
# Where its numbers of 2 bits stand in the word of the table.
_NUMBER_PLACES = (0, 2, 8, 10, 4, 6, 12, 14)


class CpuLattice(TransformedKernel):
    """See the module docstring."""

    name = "cpu_lattice"
    layout = 2
    scale = "f32"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        if scheme.weight.lattice is None:
            return "weights are no vectors of a lattice"
        if scheme.weight.lattice.second == 8:
            return "second codes of 8 bits"
        single = number_format(self.scale)
        shared = scheme == Scheme(scheme.weight, ((0, 1),), (single,))
        if not shared and (reason := self.unscaled(scheme)):
            return reason
        if shape[0] % ROWS or shape[1] % _UNIT:
            return f"is no whole tiles of {ROWS} x {_UNIT}"
        for size in shape[shared:]:
            if hadamard_factors(size) is None:
                return f"there is no Hadamard matrix of order {size}"
        return None

    def describe(self, scheme: Scheme, shape: tuple[int, ...]) -> Description:
        """The native description of the tiles."""
        layout = _layout(scheme)
        if shares := _shares(layout.divisor):
            return Description.plain(shape, CODES["e8p_pair"], factor=1 / (4 * shares[0]))
        wide = (shape[0], layout.books * shape[1])
        return Description.plain(wide, CODES["e8p"], SCALES_F32, group=shape[1])

    def table(self, scheme: Scheme) -> Tensor:
        """16 numbers, of two books of each, and the words of 256 vectors."""
        return _table(_shares(_layout(scheme).divisor))

    def tiled(self, weight: QuantizedTensor) -> Tensor:
        """uint8: blocks of 16 rows of tiles of 32 columns."""
        layout, columns = _layout(weight.scheme), weight.shape[1]
        words = torch.stack(layout.words(weight.codes), 1)  # (rows, books, vectors)
        tiles = columns // COLUMNS
        # (blocks, row / 4, row % 4, books, tiles, lines, parity)
        parted = words.view(-1, 4, 4, layout.books, tiles, 2, 2)
        indices = (parted >> 8).to(torch.uint8).permute(0, 3, 4, 1, 5, 2, 6).flatten(3)
        lines = _sign_words()[_parted()[1][parted]]
        signs = (lines[..., 0, :] | lines[..., 1, :] << 2).to(torch.int16)
        signs = signs.permute(0, 3, 4, 1, 2, 5).flatten(3).contiguous().view(torch.uint8)
        body = torch.cat((indices, signs), -1)  # (blocks, books, tiles, bytes)
        if _shares(layout.divisor):
            return body.transpose(1, 2).flatten()
        scales = torch.tensor([1.0, 1 / layout.divisor] if layout.divisor else [1.0])
        heads = scales.view(-1, 1).repeat(1, ROWS).view(torch.uint8).expand(len(body), -1, -1)
        return torch.cat((heads, body.flatten(2)), -1).flatten()

    def untiled(self, packed: PackedWeight) -> Tensor:
        """uint8 (out, bytes): the inverse of ``tiled``."""
        layout, (rows, columns) = _layout(packed.scheme), packed.shape
        tiles = columns // COLUMNS
        data, blocks = packed.buffers["data"], rows // ROWS
        if _shares(layout.divisor):
            body = data.view(blocks, tiles, layout.books, 2 * _INDICES).transpose(1, 2)
        else:
            body = data.view(blocks, layout.books, -1)[..., _HEAD:].unflatten(-1, (tiles, 2 * _INDICES))
        # (blocks, books, tiles, row / 4, lines, row % 4, parity) -> rows, books, vectors
        indices = body[..., :_INDICES].unflatten(-1, (4, 2, 4, 2)).permute(0, 3, 5, 1, 2, 4, 6)
        words = body[..., _INDICES:].contiguous().view(torch.int16).int().unflatten(-1, (4, 4, 2))
        # (blocks, books, tiles, row / 4, row % 4, lines, parity)
        of_line = torch.stack((words, words >> 2), 5)
        bits = of_line.unsqueeze(-1) >> torch.tensor(_SIGN_PLACES, dtype=torch.int32) & 1
        signs = (bits << torch.arange(8, dtype=torch.int32)).sum(-1, dtype=torch.int32)
        found = _codes_of_signs()[indices.int() << 8 | signs.permute(0, 3, 4, 1, 2, 5, 6)]
        books = found.reshape(rows, layout.books, -1)
        return layout.codes(list(books.unbind(1)))

    def before(self, inputs: Tensor) -> Rotation:
        """The Hadamard matrix of x's width, transposed."""
        return transform(len(inputs), before=inputs)

    def after(self, outputs: Tensor) -> Rotation:
        """The Hadamard matrix of y's width."""
        return transform(len(outputs), after=outputs)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        wanted = packed_linear.check_rows(ids, packed)
        return self.unpack(packed).dequantize()[wanted]


def _layout(scheme: Scheme) -> LatticeLayout:
    layout = scheme.weight.lattice
    assert layout is not None, "refuses() was asked first"
    return layout


@cache
def _parted() -> tuple[Tensor, Tensor]:
    """Of each code of 16 bits: which number each of its eight is, int64 (65536, 8), 0 to 2; and its bits of
    signs as tiles have them, int32 (65536,), the first number's lowest."""
    vectors = (e8p() * 4).int()  # 2 size * sign +- 1
    number = torch.div(vectors.abs(), 4, rounding_mode="floor")
    subtracted = vectors[:, 0] % 4 == 1  # sizes are odd
    signs = (vectors < 0) ^ (number == 1)
    signs[:, 0] ^= subtracted
    return number.long(), (signs.int() << torch.arange(8, dtype=torch.int32)).sum(1, dtype=torch.int32)


@cache
def _codes_of_signs() -> Tensor:
    """int32 (65536,): the code of each byte of signs, by the high byte."""
    found, signs = torch.zeros(1 << 16, dtype=torch.int32), _parted()[1]
    code = torch.arange(1 << 16)
    found[(code & 0xFF00) | signs] = code.int()
    return found


def _shares(divisor: float) -> tuple[int, int] | None:
    """a and b: numbers over ``divisor`` count as b of the first book's a, as float32 sees it; None where none
    are so small that sums fit."""
    if not divisor:
        return None
    share = Fraction(1 / divisor).limit_denominator(LARGEST_OF_PAIR)
    whole = LARGEST_NUMBER * (share.numerator + share.denominator) <= LARGEST_OF_PAIR
    return share.as_integer_ratio()[::-1] if whole and abs(share * divisor - 1) < 2.0**-24 else None


@cache
def _table(shares: tuple[int, int] | None) -> Tensor:
    """uint8: 16 numbers v twice in bfloat16, twice as words 4 v + 15; low and high bytes of 256 vectors.

    With ``shares`` of each book words of so many times 4 v.
    """
    size, sign, shift = torch.arange(4) * 2 + 1, torch.tensor([1, -1]), torch.tensor([1, -1])
    turned = torch.where(torch.arange(4) == 1, -1, 1)
    numbers = (2 * size * turned * sign[:, None] + shift[:, None, None]).flatten()
    floats, whole = (numbers / 4.0).bfloat16(), (numbers + 15).short()
    if shares:
        floats, whole = ((numbers * share).short() for share in shares)
    values = (part.repeat(2).view(torch.uint8) for part in (floats, whole))
    words = (_parted()[0][::256] << torch.tensor(_NUMBER_PLACES)).sum(1)
    return torch.cat((*values, low_and_high_bytes(words)))


@cache
def _sign_words() -> Tensor:
    """int32 (256,): a vector's signs in the word of its row."""
    byte = torch.arange(256)
    bits = byte.unsqueeze(1) >> torch.arange(8) & 1
    return (bits << torch.tensor(_SIGN_PLACES)).sum(1).int()
