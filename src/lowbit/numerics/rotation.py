"""Rotations of activations: what QuIP, QuaRot, SpinQuant and FP-Quant multiply x by at run time.

    y = x R,  R block diagonal: the same square matrix for every ``size`` neighbouring columns

R is mostly a Hadamard matrix of Sylvester's order (H1 = 1, H2n = [[Hn, Hn], [Hn, -Hn]]) over the root of its
size, with rows or columns times random signs. Then it is never multiplied with: the fast Walsh-Hadamard
transform takes log2(size) additions a number. Any other matrix is a product in float32; of Hadamard
matrices of orders that are no power of two (``hadamard``) only the head is one.

Every step of the transform is an addition, a subtraction, a product or a quotient rounded once, in one order:
what ``__call__`` computes has the same bits everywhere, csrc/rotation.cpp included. A product with a matrix
has the order of whoever computes it.

Sources: Chee et al., 2023 (QuIP); Tseng et al., 2024 (QuIP#); Ashkboos et al., 2024 (QuaRot); Liu et al.,
2024 (SpinQuant).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """x * before, its Hadamard transform over ``divisor``, * after; or, if there is a ``matrix``, x @ that.

    ``before``, ``after``: float32 (size,), or (width of x,) of their own for each block; None for ones.
    ``matrix``: float32 (size, size). ``head``: float32 (blocks, blocks): before ``after`` block i becomes the
    sum of head[i, j] times block j; there are no more blocks.
    """

    size: int
    before: Tensor | None = None
    after: Tensor | None = None
    matrix: Tensor | None = None
    divisor: float = 1.0
    head: Tensor | None = None

    @staticmethod
    def hadamard(size: int) -> Rotation:
        """The Hadamard matrix itself over the root of ``size``, a power of two."""
        assert size > 0 and size & (size - 1) == 0, "callers look first"
        return Rotation(size, divisor=math.sqrt(size))

    @staticmethod
    def of(matrix: Tensor, divisor: float = 1.0) -> Rotation:
        """x @ (matrix / divisor); without a product where it is a multiple of Hadamard's with signs."""
        matrix = matrix.float()
        size = len(matrix)
        if size & (size - 1) == 0:
            first = matrix[0]
            large = first[0].abs()
            signs, columns = matrix[:, 0] * first[0] / large**2, first / large  # of rows and columns
            wanted = signs.unsqueeze(1) * sylvester(size, matrix.device) * columns
            if bool(large > 0) and torch.equal(matrix, wanted * large):
                before = None if bool((signs == 1).all()) else signs.contiguous()
                after = columns * large
                return Rotation(size, before, None if bool((after == 1).all()) else after, None, divisor)
        return Rotation(size, matrix=(matrix / divisor).contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., width) of a width that ``size`` divides -> float32 (..., width). The definition."""
        blocks = x.float().unflatten(-1, (-1, self.size))
        if self.matrix is not None:
            return (blocks @ self.matrix).flatten(-2)
        if self.before is not None:
            blocks = blocks * self.before.unflatten(0, (-1, self.size))
        apart = 1
        while apart < self.size:
            a, b = blocks.unflatten(-1, (-1, 2, apart)).unbind(-2)
            blocks = torch.stack((a + b, a - b), -2).flatten(-3)
            apart *= 2
        blocks = blocks / self.divisor
        if self.head is not None:
            blocks = self.head @ blocks
        if self.after is not None:
            blocks = blocks * self.after.unflatten(0, (-1, self.size))
        return blocks.flatten(-2)

    @property
    def wide(self) -> bool:
        """Whether blocks have a ``before`` or ``after`` of their own."""
        return any(part is not None and len(part) != self.size for part in (self.before, self.after))

    @property
    def transposed(self) -> Rotation:
        """By the transposed matrix: of an orthogonal one the way back."""
        assert self.head is None, "nobody turns it round"
        matrix = None if self.matrix is None else self.matrix.T.contiguous()
        return Rotation(self.size, self.after, self.before, matrix, self.divisor)

    def to(self, device: torch.device) -> Rotation:
        """The same on a device."""
        before, after, matrix, head = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.before, self.after, self.matrix, self.head)
        )
        return Rotation(self.size, before, after, matrix, self.divisor, head)

    def same_as(self, other: Rotation) -> bool:
        """Whether both do the same to every x."""
        return (self.size, self.divisor) == (other.size, other.divisor) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in (
                (self.before, other.before),
                (self.after, other.after),
                (self.matrix, other.matrix),
                (self.head, other.head),
            )
        )


def sylvester(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The Hadamard matrix of a power of two: int8 (size, size) of 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.int8, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
