"""Rotations of activations: what QuIP, QuaRot, SpinQuant, FP-Quant and ParoQuant multiply x by at run time.

    y = x R,  R block diagonal: the same square matrix for every ``size`` neighbouring columns

R is mostly a Hadamard matrix of Sylvester's order (H1 = 1, H2n = [[Hn, Hn], [Hn, -Hn]]) over the root of its
size, with rows or columns times random signs. Then it is never multiplied with: the fast Walsh-Hadamard
transform takes log2(size) additions a number. Any other matrix is a product in float32; of Hadamard
matrices of orders that are no power of two (``hadamard``) only the head is one.

ParoQuant's R is a few steps of Givens rotations, each of all columns of a block in pairs, every block's own.

Every step of the transform is an addition, a subtraction, a product or a quotient rounded once, in one order:
what ``__call__`` computes has the same bits everywhere, csrc/rotation.cpp included. A product with a matrix
has the order of whoever computes it.

Sources: Chee et al., 2023 (QuIP); Tseng et al., 2024 (QuIP#); Ashkboos et al., 2024 (QuaRot); Liu et al.,
2024 (SpinQuant); Liang et al., 2025 (ParoQuant).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TENSORS = ("before", "after", "matrix", "head", "partners", "cosines", "sines")


@dataclass(frozen=True, eq=False)
class Rotation:
    """x * before, its Hadamard transform over ``divisor``, * after; or, if there is a ``matrix``, x @ that;
    or, if there are ``partners``, Givens rotations of pairs of columns instead of the transform.

    ``before``, ``after``: float32 (size,), or (width of x,) of their own for each block; None for ones.
    ``matrix``: float32 (size, size). ``head``: float32 (blocks, blocks): before ``after`` block i becomes the
    sum of head[i, j] times block j; there are no more blocks.
    ``partners``: int32 (steps, width of x), each block's own: in step n column c becomes x[c] cosines[n, c] +
    x[partners[n, c]] sines[n, c]; the partner of c's partner is c. ``cosines``, ``sines``: float32 alike.
    """

    size: int
    before: Tensor | None = None
    after: Tensor | None = None
    matrix: Tensor | None = None
    divisor: float = 1.0
    head: Tensor | None = None
    partners: Tensor | None = None
    cosines: Tensor | None = None
    sines: Tensor | None = None

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

    @staticmethod
    def givens(size: int, pairs: Tensor, angles: Tensor, before: Tensor | None = None) -> Rotation:
        """Of pairs (steps, blocks, size / 2, 2) of columns of a block, each column in one pair of a step, and
        float32 angles (steps, blocks, size / 2): x[i] cos + x[j] sin, x[j] cos - x[i] sin."""
        blocks = pairs.shape[1]
        pairs = pairs.long() + torch.arange(blocks).view(-1, 1, 1) * size
        flat = pairs.flatten(1)  # (steps, width)
        partners = torch.empty_like(flat).scatter_(1, flat, pairs.flip(-1).flatten(1))
        cosines, sines = angles.cos(), angles.sin()
        spread = (torch.stack(both, -1).flatten(1) for both in ((cosines, cosines), (sines, -sines)))
        cosines, sines = (torch.empty_like(values).scatter_(1, flat, values) for values in spread)
        return Rotation(size, before, partners=partners.int(), cosines=cosines, sines=sines)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., width) of a width that ``size`` divides -> float32 (..., width). The definition."""
        if self.partners is not None:
            return self._by_pairs(x.float())
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

    def _by_pairs(self, x: Tensor) -> Tensor:
        assert self.partners is not None and self.cosines is not None and self.sines is not None
        if self.before is not None:
            x = x * self.before
        for partners, cosines, sines in zip(self.partners, self.cosines, self.sines, strict=True):
            x = x * cosines + x[..., partners] * sines
        return x if self.after is None else x * self.after

    def columns(self, start: int, stop: int) -> Rotation:
        """Of whole blocks alone, those of columns ``start:stop``."""
        if self.partners is None and not self.wide:
            return self
        assert self.head is None and start % self.size == stop % self.size == 0, "callers cut between blocks"

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[..., start:stop].contiguous()

        before, after, cosines, sines = map(cut, (self.before, self.after, self.cosines, self.sines))
        partners = None if self.partners is None else (self.partners[:, start:stop] - start).contiguous()
        return replace(self, before=before, after=after, partners=partners, cosines=cosines, sines=sines)

    @property
    def wide(self) -> bool:
        """Whether blocks have a ``before`` or ``after`` of their own."""
        return any(part is not None and len(part) != self.size for part in (self.before, self.after))

    @property
    def transposed(self) -> Rotation:
        """By the transposed matrix: of an orthogonal one the way back."""
        assert self.head is None, "nobody turns it round"
        matrix = None if self.matrix is None else self.matrix.T.contiguous()
        partners, cosines, sines = (
            None if steps is None else steps.flip(0) for steps in (self.partners, self.cosines, self.sines)
        )
        sines = None if sines is None else -sines
        return Rotation(
            self.size,
            self.after,
            self.before,
            matrix,
            self.divisor,
            partners=partners,
            cosines=cosines,
            sines=sines,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by their names."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def is_whole(self) -> bool:
        """Whether its tensors have the shapes that belong together, and partners are columns of one block."""
        tensors = self.tensors
        matrix, head = tensors.pop("matrix", None), tensors.pop("head", None)
        partners = tensors.get("partners")
        blocks = 1 if head is None else len(head)  # there are so many where there is a head
        steps, width = (1, self.size * blocks) if partners is None else partners.shape
        if partners is not None:
            own = torch.arange(width) // self.size
            if width % self.size or not bool((partners.cpu() // self.size == own).all()):
                return False
        shapes = {"before": (width,), "after": (width,)}
        return (
            (matrix is None or matrix.shape == (self.size, self.size))
            and (head is None or head.shape == (blocks, blocks))
            and ("partners" in tensors) == ("cosines" in tensors) == ("sines" in tensors)
            and all(tensor.shape == shapes.get(name, (steps, width)) for name, tensor in tensors.items())
        )

    def to(self, device: torch.device) -> Rotation:
        """The same on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)  # type: ignore[arg-type]  # fields of tensors alone

    def same_as(self, other: Rotation) -> bool:
        """Whether both do the same to every x."""
        mine, others = self.tensors, other.tensors
        return (self.size, self.divisor, mine.keys()) == (other.size, other.divisor, others.keys()) and all(
            tensor is others[name] or torch.equal(tensor, others[name]) for name, tensor in mine.items()
        )


def sylvester(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The Hadamard matrix of a power of two: int8 (size, size) of 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.int8, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
