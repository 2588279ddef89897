"""Vectors of the lattice E8 between two Hadamard transforms (QuIP#, Tseng et al., 2024): what codes mean.

    weight = diag(outputs) H_out u H_in^T diag(inputs)      H_n: the Hadamard matrix of order n (``hadamard``)

u are vectors of eight columns that a code of 16 bits stands for, or the sum of two, the second over a
divisor. The vectors (E8P) are 256 vectors of halves, times signs, plus or minus 1/4. The 256 are all vectors
of odd halves (1/2, 3/2, 5/2) whose squares sum up to 10 at most, in rising order, and 29 of those with five
3/2 and three 1/2. The high byte of a code says which. The low byte has a sign for each number, of which an
even count is set if an odd sum's last number counts as negative; so one bit is spare and says the quarter:
bit 0 is what makes the byte's parity even, and where it had to be turned a quarter is subtracted, else added.

Ranks share the rows of u, whose products they gather before the second transform: what one of them has is a
weight with the scales of columns alone, some rows of u H_in^T diag(inputs), and its numbers are not rounded.

A second code may have 8 bits instead, and stand for a vector of E8's own: one of the 241 points whose squares
sum up to 2 at most, whole numbers before halves, each in rising order; then 2 and -2 on one axis, the last
without -2.

Products with H are made in float32, of vectors of one code exactly, and a weight is rounded to float16, once.

Source: Tseng et al., 2024 (QuIP#), section 4 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from lowbit.numerics.hadamard import hadamard_factors, hadamard_head, times
from lowbit.numerics.rotation import Rotation

LENGTH = 8  # columns of a vector
TILE_ROWS = 16  # that files have together
# Where the 3/2 are, the first number the highest bit.
_TWELVES = bytes.fromhex(
    "8F 4F 2F 1F EC EA E6 E9 E5 E3 DC DA D6 D9 D5 D3 BC BA B6 B9 B5 73 7C 7A 76 79 75 37 CE"
)
_SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)  # of each number
_SLICE = 1 << 22  # weights that are transformed at once


@dataclass(frozen=True)
class LatticeLayout:
    """A code for every eight columns; with a ``divisor`` a second one, whose vector is divided by it.

    The codes of a weight (out, in) are uint8 (out, bytes): the first codes of a row, of 16 bits, then the
    second ones, of ``second`` (16 or 8), the low byte of each first. All rows and all columns mean something
    together only; without the scales of rows, and so without their transform, all columns.
    """

    divisor: float = 0.0
    second: int = 16

    def __post_init__(self) -> None:
        assert self.second in ((8, 16) if self.divisor else (16,)), "a second code has a divisor"

    @property
    def name(self) -> str:
        """Of the number format: "e8p", "e8p+e8p/3.45", "e8p+e8/2.04"."""
        book = "e8p" if self.second == 16 else "e8"
        return f"e8p+{book}/{self.divisor!r}" if self.divisor else "e8p"

    @property
    def books(self) -> int:
        """Codes of a vector."""
        return 2 if self.divisor else 1

    @property
    def bits(self) -> int:
        """Of a weight."""
        return (16 + self.second * (self.books - 1)) // LENGTH

    def codes(self, books: list[Tensor]) -> Tensor:
        """Of each book the codes, (out, in / 8) -> uint8 (out, bytes)."""
        parts = [torch.stack((words & 255, words >> 8), -1).flatten(1) for words in books]
        if self.second == 8:
            parts[1] = books[1]
        return torch.cat(parts, 1).to(torch.uint8)

    def words(self, codes: Tensor) -> list[Tensor]:
        """uint8 (out, bytes) -> of each book int32 (out, in / 8)."""
        first = codes.shape[1] * 2 // self.bits  # bytes of the first codes
        parts = (codes[:, :first].int(), codes[:, first:].int())[: self.books]
        sizes = (16, self.second)
        return [
            part if size == 8 else part[:, ::2] | part[:, 1::2] << 8
            for part, size in zip(parts, sizes, strict=False)
        ]

    def vectors(self, codes: Tensor) -> Tensor:
        """uint8 (out, bytes) -> float32 (out, in): u."""
        words = self.words(codes)
        found = e8p()[words[0]].flatten(1)
        if not self.divisor:
            return found
        second = e8p() if self.second == 16 else e8()
        return found + second[words[1]].flatten(1) / self.divisor

    def decode(self, codes: Tensor, *scales: Tensor) -> Tensor:
        """float32 (out, in), float16's numbers; ``scales``: of outputs (out, 1) and of inputs (1, in).

        Of inputs alone: rows that are not transformed, in float32.
        """
        *first, inputs = (scale.flatten() for scale in scales)
        if not first:
            return times(_factors(len(inputs)), self.vectors(codes), 1) * inputs
        return transformed(lambda rows: self.vectors(codes[rows]), first[0], inputs).float()

    def some_rows(self, codes: Tensor, outputs: Tensor, inputs: Tensor, start: int, stop: int) -> Tensor:
        """The same of a few rows, whose sums are made in another order."""
        out, columns = len(codes), inputs.shape[1]
        left, right = _factors(columns), _factors(out)
        chosen = torch.zeros(out, stop - start)
        chosen[torch.arange(start, stop), torch.arange(stop - start)] = 1
        signs = times([matrix.T.contiguous() for matrix in right], chosen, stop - start).T
        found, step = torch.zeros(stop - start, columns), max(1, _SLICE // columns)
        for first in range(0, out, step):
            rows = slice(first, first + step)
            found += signs[:, rows] @ self.vectors(codes[rows])
        return (times(left, found, 1) * outputs[start:stop] * inputs).half().float()


def transformed(vectors: Callable[[slice], Tensor], outputs: Tensor, inputs: Tensor) -> Tensor:
    """float16 (out, in): rows and columns of u, transformed and scaled.

    ``vectors``: float32 rows of u, of which 16 lie together; ``outputs`` float32 (out,), ``inputs`` (in,).
    """
    out, columns = len(outputs), len(inputs)
    left, right = _factors(columns), _factors(out)
    inner = torch.empty(out, columns)
    step = max(16, _SLICE // columns // 16 * 16)
    for start in range(0, out, step):
        inner[start : start + step] = times(left, vectors(slice(start, start + step)), 1)
    weight = torch.empty(out, columns, dtype=torch.float16)
    step = max(1, _SLICE // out)
    for start in range(0, columns, step):
        part = inner[:, start : start + step].contiguous()
        part = times(right, part, part.shape[1])
        weight[:, start : start + step] = part * outputs[:, None] * inputs[start : start + step]
    return weight


def transform(order: int, before: Tensor | None = None, after: Tensor | None = None) -> Rotation:
    """By the transposed Hadamard matrix of x that is scaled before, by the matrix itself of what is after."""
    head = hadamard_head(order)
    if head is None:
        return Rotation(order, before, after)
    turned = (head if before is None else head.T).contiguous()
    return Rotation(order // len(head), before, after, head=turned)


def _factors(order: int) -> list[Tensor]:
    found = hadamard_factors(order)
    assert found is not None, "callers look first"
    return found


@cache
def e8p() -> Tensor:
    """Float32 (65536, 8): the vector of each code."""
    odd = torch.tensor(list(product((1, 3, 5), repeat=8)))  # in halves
    twelves = torch.tensor([[1 + 2 * (byte >> 7 - at & 1) for at in range(8)] for byte in _TWELVES])
    sizes = torch.cat((odd[odd.square().sum(1) <= 40], twelves))
    sizes[:, 7] *= 1 - sizes.sum(1) // 2 % 2 * 2
    low = torch.arange(256)
    parity = torch.stack([low >> bit & 1 for bit in range(8)]).sum(0) % 2
    bits = torch.stack([(low ^ parity) >> bit & 1 for bit in _SIGN_BITS], 1)
    quarters = 2 * sizes[:, None] * (1 - 2 * bits) + (1 - 2 * parity)[:, None]
    return (quarters / 4.0).view(-1, 8)


@cache
def e8() -> Tensor:
    """Float32 (256, 8): the vector of each code of 8 bits."""
    whole = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=8)))
    halves = torch.tensor(list(product((-0.5, 0.5), repeat=8)))
    points = torch.cat((whole, halves))
    points = points[(points.sum(1) % 2 == 0) & (points.square().sum(1) <= 2)]
    return torch.cat((points, 2 * torch.eye(8), -2 * torch.eye(8)[:7]))
