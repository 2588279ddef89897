"""Codebooks as whole numbers of 16 bits over a factor, for x as whole numbers of 15 (csrc/linear_words.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_X, LARGEST_WORD = (1 << 14) - 1, (1 << 15) - 1
LARGEST_SUM = (2**31 - 1) / _LARGEST_X  # of the sizes of 32 columns' numbers: their products fit 32 bits


def factor_from(least: float, numbers: Tensor) -> float:
    """What whole numbers are multiplied with to be worth ``numbers``: ``least`` as a float32, or the power of
    two from there on where that makes all of them exact; 1 where ``least`` is 0."""
    if not least:
        return 1.0
    power = 2.0 ** math.ceil(math.log2(least))
    exact = numbers.double() / power
    return power if torch.equal(exact.round(), exact) else float(torch.tensor(least))


def in_words(numbers: Tensor, factor: float) -> Tensor:
    """int16: ``numbers`` over the factor."""
    return (numbers.double() / factor).round().short()
