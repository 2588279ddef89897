"""How QuIP# packs its codes; what they mean is in ``numerics.lattice``.

Source: Tseng et al., 2024 (QuIP#), section 4 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.numerics.lattice import LatticeLayout


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
        layout = self.layout(divisor)
        return layout.vectors(layout.codes(self.codes(words)))

    def layout(self, divisor: float) -> LatticeLayout:
        """Of the codes, the second ones over ``divisor``."""
        return LatticeLayout(divisor, self.second) if self.second else LatticeLayout()

    def codes(self, words: Tensor) -> list[Tensor]:
        """Int32 (rows, columns / 8), once or twice."""
        first, rest = self._parted(words)
        if not self.second:
            return [_e8p_codes(first)]
        return [_e8p_codes(first), _e8_codes(rest) if self.second == 8 else _e8p_codes(rest)]

    def _parted(self, words: Tensor) -> tuple[Tensor, Tensor]:
        columns = words.shape[1] // self.words * 64
        return words[:, : columns // 32], words[:, columns // 32 :].contiguous()


CODEBOOKS = {
    "E8P12": Codebook(7, 1, 2),
    "E8P12RVQ3B": Codebook(18, 0, 3, 8, 2.04),
    "E8P12RVQ4B": Codebook(17, 1, 4, 16, 3.45),
}


def _e8p_codes(words: Tensor) -> Tensor:
    """A word holds 2 rows x 2 vectors, column by column: their high bytes below, their signs above, bit j of
    the four beside each other. Words lie in tiles of 8 pairs of rows x 64 columns, as a tensor core reads
    them."""
    rows, columns = words.shape[0], words.shape[1] * 32
    tiles = words.reshape(rows // 16, columns // 64, 8, 4).transpose(1, 2).contiguous()
    high, signs = tiles.view(torch.uint8).view(-1, 2, 4).int().unbind(1)
    bits = _spread()[signs]  # (words, 4): two bits of each of the four codes
    low = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
    codes = high << 8 | low.view(torch.uint8).view(-1, 4)
    return codes.view(rows // 2, columns // 16, 2, 2).permute(0, 3, 1, 2).reshape(rows, -1)


def _e8_codes(words: Tensor) -> Tensor:
    """A word holds eight codes of neighbouring vectors, the first lowest."""
    return words.view(torch.uint8).int().view(words.shape[0], -1)


@cache
def _spread() -> Tensor:
    """Int32 (256,): bits i and 4 + i of a byte as the two lowest of byte i."""
    byte = torch.arange(256, dtype=torch.int32)
    return torch.stack([(byte >> i & 1 | (byte >> 4 + i & 1) << 1) << 8 * i for i in range(4)]).sum(0).int()
