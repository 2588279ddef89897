"""Trellises of codes (EXL3, after QTIP, Tseng et al., 2024): what their bits mean.

    weight = (diag(inputs) H tiles H diag(outputs))^T     H: blocks of a Hadamard matrix of 128 over sqrt(128)

A tile is 16 inputs by 16 outputs, K bits each. Its bits lie from the highest of each 16, of every two 16s the
second before the first. Weight t is the code book's number for 16 bits: its own K, which end with bit
K (t + 1), behind those before them, and before a tile's first bit comes its last. In which order weights lie
(a tensor core operand's) ``_places`` says. A code book multiplies the 16 bits by a constant; its number is
the sum of both halves of the product, with some bits set, as float16 ("3inst", "mcg"), or of its four bytes,
scaled ("mul1"). The products with H are made in float32 and the weight is rounded to float16, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.numerics.rotation import Rotation

BLOCK = 128  # of a Hadamard transform, of inputs and of outputs
TILE = 16
MULTIPLIERS = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
_SLICE = 1 << 22  # weights that are decoded at once


@dataclass(frozen=True)
class TrellisLayout:
    """Tiles of ``bits`` bits a weight with the numbers of ``book``, in whole blocks of 128 x 128.

    The codes of a weight (out, in) are uint8 (out, 2 ``bits`` in / 16): a tile's bytes cut into 16 pieces,
    one for each of its rows, so that rows and columns of whole tiles are slices. Piece r does not mean
    row r.

    Where 128 does not divide out or in, codes and scales are those of whole blocks, and the weight is the
    first rows and columns of what they mean; or the rows from ``skip`` on, which is less than 128.
    """

    bits: int
    book: str
    skip: int = 0

    @property
    def name(self) -> str:
        """Of the number format: "trellis4_mcg", "trellis4_mcg_from64"."""
        return f"trellis{self.bits}_{self.book}" + (f"_from{self.skip}" if self.skip else "")

    def whole(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the blocks that a weight of ``shape`` lies in."""
        return self.blocks(shape[-2] + self.skip), self.blocks(shape[-1])

    @staticmethod
    def blocks(size: int) -> int:
        """``size``, or the next multiple of 128."""
        return -(-size // BLOCK) * BLOCK

    def row_bytes(self, columns: int) -> int:
        """Of the pieces of a row of tiles; columns up to the end of a block."""
        return self.blocks(columns) // TILE * 2 * self.bits

    def codes(self, trellis: Tensor) -> Tensor:
        """Tiles as EXL3 stores them, int16 (in / 16, out / 16, 16 bits) -> uint8 (out, bytes)."""
        parted = trellis.contiguous().view(torch.uint8).unflatten(-1, (TILE, -1))
        return parted.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def tiles(self, codes: Tensor) -> Tensor:
        """The inverse of ``codes``."""
        parted = codes.unflatten(0, (-1, TILE)).unflatten(-1, (-1, 2 * self.bits))
        return parted.permute(2, 0, 1, 3).flatten(2).contiguous().view(torch.int16)

    def decode(self, codes: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        """float32 (out, in) of whole blocks, float16's numbers; ``outputs`` (out, 1), ``inputs`` (1, in)."""
        found = torch.empty(len(codes), inputs.shape[-1])
        trellis = self.tiles(codes)
        for start, part in decoded(trellis, self.book, inputs.flatten().float(), outputs.flatten().float()):
            found[start : start + len(part)] = part.half()
        return found


@cache
def code_book(name: str) -> Tensor:
    """float16 (65536,): the number of each 16 bits."""
    product = torch.arange(1 << 16) * MULTIPLIERS[name]
    if name == "mul1":  # float16 1024 + the sum, times one constant plus another, rounded once
        total = sum((product >> shift & 255 for shift in (0, 8, 16, 24)), torch.tensor(1024))
        scale, shift = _halves(torch.tensor([0x1EEE, 0xC931]))
        return (total.float() * scale + shift).half()
    if name == "3inst":
        product += 64248484
    low, high = (_halves((product >> shift & 0x8FFF) ^ 0x3B60) for shift in (0, 16))
    return (low + high).half()


def _halves(bits: Tensor) -> Tensor:
    """float32 of the float16 with these 16 bits."""
    return bits.to(torch.uint16).view(torch.float16).float()


@cache
def _places(bits: int) -> tuple[Tensor, Tensor]:
    """For a tile's weights as a matrix (in, out): the 16-bit word that a code ends in, int64 (256,), and
    how many bits of the word come after it, int32 (256, 1)."""
    row, column = torch.arange(16)[:, None], torch.arange(16)
    lane = column % 8 * 4 + row % 8 // 2
    number = lane * 8 + (row % 2 + row // 8 * 2 + column // 8 * 4)
    end = (number.flatten() + 1) * bits
    word = (end - 1) // 16
    return word, ((word + 1) * 16 - end).int()[:, None]


@cache
def _hadamard() -> Tensor:
    return Rotation.hadamard(BLOCK)(torch.eye(BLOCK))


def decoded(trellis: Tensor, book: str, inputs: Tensor, outputs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 (rows, in)) of whole blocks of outputs; ``inputs`` and ``outputs`` float32."""
    rows, tiles, words_a_tile = trellis.shape
    word, after = _places(words_a_tile // 16)
    order, table = torch.arange(words_a_tile) ^ 1, code_book(book)
    turn, columns = _hadamard(), rows * TILE
    step = max(1, _SLICE // (columns * BLOCK)) * BLOCK
    for start in range(0, tiles * TILE, step):
        words = trellis[:, start // TILE : (start + step) // TILE].reshape(-1, words_a_tile)
        words = words.int().T[order]  # (words, tiles)
        ends = words.roll(1, 0) << 16 | words & 0xFFFF  # each word behind the one before it
        codes = (ends.index_select(0, word) >> after).bitwise_and_(0xFFFF)
        values = table.index_select(0, codes.view(-1)).view(16, 16, rows, -1).permute(3, 1, 2, 0)
        part = values.reshape(-1, BLOCK).float() @ turn
        part = part.view(-1, BLOCK, columns) * inputs
        yield start, (turn @ part).view(-1, columns) * outputs[start : start + step, None]
