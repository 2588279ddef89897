"""What the GGUF encoders share: codes into bytes, and arithmetic that rounds as ggml's C does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def half_bytes(x: Tensor) -> Tensor:
    """float32 (…, n) -> uint8 (…, 2 n), little-endian float16."""
    return x.half().contiguous().view(torch.uint8)


def join_nibbles(codes: Tensor) -> Tensor:
    """(…, 2 n) codes below 16 -> (…, n) bytes: byte j holds codes j and n + j."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def join_planes(codes: Tensor, width: int) -> Tensor:
    """(…, planes, n) -> (…, n) bytes: plane j lies at bits j * width."""
    joined = codes[..., 0, :]
    for plane in range(1, codes.shape[-2]):
        joined = joined | codes[..., plane, :] << plane * width
    return joined


def join_bits(bits: Tensor) -> Tensor:
    """(…, 8 n) of 0 and 1 -> (…, n) bytes, lowest bit first."""
    return join_planes(bits.unflatten(-1, (-1, 8)).transpose(-1, -2), 1)


def largest_magnitude(x: Tensor) -> Tensor:
    """(blocks, n) -> (blocks, 1)."""
    return x.abs().amax(-1, keepdim=True)


def largest_weight(x: Tensor) -> Tensor:
    """(blocks, n) -> (blocks, 1): the weight of largest magnitude with its sign, the first of equal ones."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def over(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once: torch would multiply with the reciprocal."""
    return torch.full_like(x, number) / x


def nearest(x: Tensor) -> Tensor:
    """int32: the low 23 bits of x + 1.5 * 2^23. The nearest integer, ties to even, where |x| < 2^22."""
    return ((x + 12582912.0).view(torch.int32) & 0x7FFFFF) - 0x400000


def nearest_between(x: Tensor, low: int, high: int) -> Tensor:
    return nearest(x).clamp_(low, high).float()


def in_order(terms: Tensor | Sequence[Tensor]) -> Tensor:
    """The sum over the first axis, one after the other from zero."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total
