"""Scales of 4-bit and MX formats in the order of NVIDIA's tensor cores: tiles of 128 rows and 4 columns.

    of row r, column c    tile (r // 128) * tiles across + c // 4
                          in it byte (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4

Rows and columns that fill up the last tiles hold anything. The source is cuBLAS' documentation ("1D block
scaling factors layout"); torchao and transformers call it swizzled or blocked, the tools of ModelOpt
interleaved.
"""

from __future__ import annotations

from torch import Tensor

TILE = (128, 4)


def tiles_of(rows: int, columns: int) -> tuple[int, int]:
    """How many tiles a matrix of scales has, down and across."""
    return -(-rows // TILE[0]), -(-columns // TILE[1])


def in_rows(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) of bytes in tiles, of any shape."""
    down, across = tiles_of(rows, columns)
    tiles = tiled.reshape(down, across, 32, 4, 4)
    straight = tiles.permute(0, 3, 2, 1, 4).reshape(down * TILE[0], across * TILE[1])
    return straight[:rows, :columns]
