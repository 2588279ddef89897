"""Hadamard matrices whose order is no power of two, as products of small matrices of 1 and -1.

The order is K 2^k, the matrix H_K (x) H_2 (x) … (x) H_2 with H_2 = [[1, 1], [1, -1]]. H_K is

    q + 1 = 12, 20, 60, 108, 140   Paley's first construction, q = 3 mod 4
    2 (q + 1) = 28, 36             Paley's second, q = 1 mod 4
    52, 116, 124, 156, 172         four symmetric circulants in Williamson's array

There are many more matrices of these orders; which of them QuIP# multiplies by is part of its format.

Sources: Paley, 1933; Williamson, 1944; Sloane's library of Hadamard matrices (the circulants' first rows).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_FIRST = (12, 20, 60, 108, 140)
_SECOND = (28, 36)
# Half of each circulant's symmetric first row, its first number the highest bit: 1 is 1, 0 is -1.
_WILLIAMSON = {
    52: (0x53, 0x47, 0x69, 0x42),
    116: (0x64BB, 0x7B47, 0x5197, 0x7194),
    124: (0x9D21, 0x9D21, 0x83A9, 0xFC56),
    156: (0xE504C, 0xF130A, 0xE68A4, 0x8D41D),
    172: (0x233D76, 0x37E14D, 0x3ACAF4, 0x31E930),
}
_PIECE = 6  # powers of two multiplied at once: 64 x 64


def hadamard_factors(order: int) -> list[Tensor] | None:
    """Float32 matrices whose Kronecker product is the matrix of this order; None where there is none here."""
    for head in sorted((*_FIRST, *_SECOND, *_WILLIAMSON), reverse=True):
        if order % head == 0:
            break
    else:
        head = 1
    rest = order // head
    if order < 1 or rest & (rest - 1):
        return None
    power = rest.bit_length() - 1
    pieces = -(-power // _PIECE)
    powers = [power // pieces + (number < power % pieces) for number in range(pieces)]
    return ([_head(head)] if head > 1 else []) + [_sylvester(one) for one in powers]


def hadamard_head(order: int) -> Tensor | None:
    """Float32, the first of them: what is left where powers of two are divided out; None where nothing is."""
    factors = hadamard_factors(order)
    assert factors is not None, "callers look first"
    return None if not factors or len(factors[0]) & (len(factors[0]) - 1) == 0 else factors[0]


def times(factors: list[Tensor], x: Tensor, trailing: int) -> Tensor:
    """The product's matrix times float32 x: along the axis of its order, ``trailing`` numbers behind it.

    Sums are exact while they stay below 2^24 units of x's last bit.
    """
    shape = x.shape
    behind = trailing
    for matrix in factors[::-1]:
        size = len(matrix)
        x = x.reshape(-1, size) @ matrix.T if behind == 1 else matrix @ x.reshape(-1, size, behind)
        behind *= size
    return x.reshape(shape)


@cache
def _sylvester(power: int) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@cache
def _head(order: int) -> Tensor:
    """Float32 (order, order)."""
    if order in _FIRST:
        matrix = _bordered(order - 1)
        matrix[0, 1:] = -1
        return matrix + torch.eye(order)
    if order in _SECOND:
        conference, one = _bordered(order // 2 - 1), torch.eye(order // 2)
        upper, lower = conference + one, conference - one
        return torch.cat((torch.cat((upper, lower), 1), torch.cat((lower, -upper), 1)))
    a, b, c, d = (_circulant(bits, order // 4) for bits in _WILLIAMSON[order])
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


def _bordered(prime: int) -> Tensor:
    """(q + 1, q + 1): 1 where i - j is a square mod q, -1 where it is none, bordered with ones."""
    squares = torch.full((prime,), -1.0)
    squares[torch.arange(prime).square() % prime] = 1
    squares[0] = 0
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[0, 0] = 0
    matrix[1:, 1:] = squares[(index[:, None] - index) % prime]
    return matrix


def _circulant(bits: int, size: int) -> Tensor:
    """From the first half of a symmetric first row."""
    half = size // 2 + 1
    first = torch.tensor([float((bits >> half - 1 - at & 1) * 2 - 1) for at in range(half)])
    index = torch.arange(size)
    apart = (index[:, None] - index) % size
    return first[torch.minimum(apart, size - apart)]
