"""The order in which FLUTE (Guo et al., 2024) packs codes of 2, 3 and 4 bits for its GPU kernels.

A weight (out, in) is I16 [out * bits / 16, in]; words of 2k and 2k + 1 hold codes of these two columns, which
a kernel looks up as a pair. The order of rows follows from one number of the kernel's template, TileP: with T
of it, row (c A + a) T + t has the pair of columns 2k (high bits) and 2k + 1 (low bits) in

    4 bits, A = 4    byte a % 2 of word [c T + t, 2k + h], h = a // 2
    2 bits, A = 8    nibble a % 4 of word [c T + t, 2k + h], h = a // 4
    3 bits, A = 16   six bits from 6 s on of word w of 32 bits, a = 3 s + w; the pair of a = 15 has its bits
                     2 w and 2 w + 1 in bits 30 and 31 of the three. Halves of word w are [row, 2k] (low) and
                     [row, 2k + 1], row = c T + t for w = 0, out / 16 + (2 c + w - 1) T + t else. T is 32.

Templates (FLUTE 0.2 to 0.4 have the same list) are counted by multiples of a GPU's processors, then shapes of
tiles, stages and, of 4 bits, ways to look codes up: 3 x 3 x 4 x (4 or 1). The first shape has a TileP of 64,
the others 32. Before 0.4 a table said which template a matrix has on a GPU: all of its 3,816 have 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROCESSORS = (84, 108, 128)  # of the GPUs in the table before 0.4
TILE = 32  # of all templates in that table
_TALL_TILE = 64
_SHAPES, _STAGES = 3, 4


def templates(bits: int) -> int:
    """How many there are."""
    return 3 * _SHAPES * _ways(bits)


def tile_of(bits: int, template: int) -> int:
    """TileP of a template's number, which must be below ``templates``."""
    assert 0 <= template < templates(bits), "callers look first"
    return _TALL_TILE if template // _ways(bits) % _SHAPES == 0 else TILE


def _ways(bits: int) -> int:
    """Templates of one shape of tiles."""
    return _STAGES * (4 if bits == 4 else 1)


def rows_together(bits: int, tile: int) -> int:
    """So many rows have their codes among each other."""
    return tile * (16 if bits == 3 else 16 // bits)


def pairs(words: Tensor, bits: int, tile: int) -> Tensor:
    """int16 (out * bits / 16, in) -> uint8 (out, in / 2): code 2k << bits | code 2k + 1."""
    if bits == 3:
        return _of_three_bits(words)
    # (chunks, T, in / 2, h, byte of the word)
    stored = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 2, 2)).unflatten(0, (-1, tile))
    split = stored.unsqueeze(-1) if bits == 4 else torch.stack((stored & 15, stored >> 4), -1)
    # (chunks, h, byte, pair of it, T, in / 2): a in order
    return split.permute(0, 3, 4, 5, 1, 2).flatten(0, 4)


def _of_three_bits(words: Tensor) -> Tensor:
    first = len(words) // 3
    wide = words.contiguous().view(torch.int32)  # (out * 3 / 16, in / 2)
    of_words = [
        wide[:first].unflatten(0, (-1, TILE)),
        *wide[first:].unflatten(0, (-1, 2, TILE)).unbind(1),
    ]  # three times (chunks, T, in / 2)
    last = torch.zeros_like(of_words[0])
    found = []
    for step in range(5):
        found += [(word >> 6 * step & 63).to(torch.uint8) for word in of_words]
    for number, word in enumerate(of_words):
        last |= (word >> 30 & 3) << 2 * number
    found.append(last.to(torch.uint8))
    return torch.stack(found, 1).flatten(0, 2)  # (chunks, a, T, in / 2)
