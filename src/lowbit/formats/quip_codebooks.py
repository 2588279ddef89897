"""The vectors of eight numbers that QuIP#'s codes stand for, from the lattice E8's definition.

E8P (16 bits a vector): 256 vectors of halves, times signs, plus or minus 1/4. The 256 are all vectors of odd
halves (1/2, 3/2, 5/2) whose squares sum up to 10 at most, in rising order, and 29 of those with five 3/2 and
three 1/2. The high byte of a code says which. The low byte has a sign for each number, of which an even
count is set if an odd sum's last number counts as negative; so one bit is spare and says the quarter:
bit 0 is what makes the byte's parity even, and where it had to be turned a quarter is subtracted, else added.

E8 (8 bits): the 241 points of the lattice E8 whose squares sum up to 2 at most, whole numbers before halves,
each in rising order; then 2 and -2 on one axis, the last without -2.

Source: Tseng et al., 2024 (QuIP#), section 4 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

# Where the 3/2 are, the first number the highest bit.
_TWELVES = bytes.fromhex(
    "8F 4F 2F 1F EC EA E6 E9 E5 E3 DC DA D6 D9 D5 D3 BC BA B6 B9 B5 73 7C 7A 76 79 75 37 CE"
)
_SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)  # of each number


@dataclass(frozen=True)
class Codebook:
    """``number``: its codebook_id. ``version``: of the packing. ``words``: int64 words for 64 columns.

    ``second``: bits of the second code, of what the first left over: 8, 16, or 0; divided by ``divisor``.
    """

    number: int
    version: int
    words: int
    second: int = 0
    divisor: float = 1.0

    def vectors(self, words: Tensor, divisor: float) -> Tensor:
        """Float32 (rows, columns) of int64 (rows, columns / 64 * words); rows: a multiple of 16."""
        columns = words.shape[1] // self.words * 64
        found = _e8p_vectors(words[:, : columns // 32])
        if self.second:
            rest = words[:, columns // 32 :].contiguous()
            found += (_e8_vectors(rest) if self.second == 8 else _e8p_vectors(rest)) / divisor
        return found


CODEBOOKS = {
    "E8P12": Codebook(7, 1, 2),
    "E8P12RVQ3B": Codebook(18, 0, 3, 8, 2.04),
    "E8P12RVQ4B": Codebook(17, 1, 4, 16, 3.45),
}


def _e8p_vectors(words: Tensor) -> Tensor:
    """A word holds 2 rows x 2 vectors, column by column: their high bytes below, their signs above, bit j of
    the four beside each other. Words lie in tiles of 8 pairs of rows x 64 columns, as a tensor core reads
    them."""
    rows, columns = words.shape[0], words.shape[1] * 32
    tiles = words.reshape(rows // 16, columns // 64, 8, 4).transpose(1, 2).contiguous()
    high, signs = tiles.view(torch.uint8).view(-1, 2, 4).int().unbind(1)
    bits = _spread()[signs]  # (words, 4): two bits of each of the four codes
    low = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
    codes = high << 8 | low.view(torch.uint8).view(-1, 4)
    codes = codes.view(rows // 2, columns // 16, 2, 2).permute(0, 3, 1, 2).reshape(rows, -1)
    return _e8p()[codes].view(rows, columns)


def _e8_vectors(words: Tensor) -> Tensor:
    """A word holds eight codes of neighbouring vectors, the first lowest."""
    return _e8()[words.view(torch.uint8).int()].view(words.shape[0], -1)


@cache
def _spread() -> Tensor:
    """Int32 (256,): bits i and 4 + i of a byte as the two lowest of byte i."""
    byte = torch.arange(256, dtype=torch.int32)
    return torch.stack([(byte >> i & 1 | (byte >> 4 + i & 1) << 1) << 8 * i for i in range(4)]).sum(0).int()


@cache
def _e8p() -> Tensor:
    """Float32 (65536, 8)."""
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
def _e8() -> Tensor:
    """Float32 (256, 8)."""
    whole = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=8)))
    halves = torch.tensor(list(product((-0.5, 0.5), repeat=8)))
    points = torch.cat((whole, halves))
    points = points[(points.sum(1) % 2 == 0) & (points.square().sum(1) <= 2)]
    return torch.cat((points, 2 * torch.eye(8), -2 * torch.eye(8)[:7]))
