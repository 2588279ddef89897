"""Packed weights read back in torch: the inverse of ``packed_linear.pack``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.packed_linear import (
    ADDEND_ZERO,
    CODES,
    COLUMNS,
    DENSE_CODES,
    GRIDS,
    ROWS,
    SCALE_DTYPES,
    SUPER,
    Description,
    Grid,
    NativeWeight,
    planes,
)


@dataclass(frozen=True)
class Unpacked:
    """``Parts`` read back from packed bytes; padding rows and columns cut off."""

    codes: Tensor  # uint8 (rows, columns), offset binary, of a grid as in ``Parts``; or the dense matrix
    scales: Tensor | None
    addends: Tensor | None
    outer_scales: Tensor | None
    outer_addends: Tensor | None


def unpack(packed: NativeWeight) -> Unpacked:
    """What a weight was packed of."""
    d, columns = packed.description, packed.columns
    blocks = packed.buffers["data"].view(-(-d.rows // ROWS), -1)
    supers = d.columns // SUPER if d.super_size else 1
    per_super = blocks.view(len(blocks), supers, -1)  # (blocks, supers, bytes)
    outer, body = per_super[..., : d.super_size], per_super[..., d.super_size :]
    units = body.reshape(len(blocks), d.columns // d.unit, -1)  # (blocks, units, bytes)
    headers = d.unit // d.group
    header_size = headers * (d.scale_size + d.addend_size)
    head = units[..., :header_size].unflatten(-1, (headers, -1)) if header_size else None
    scale_dtype = torch.uint8 if d.nibbles else torch.int8 if d.super_size else SCALE_DTYPES.get(d.scales)
    addend_dtype = torch.float16 if d.addend == ADDEND_ZERO else scale_dtype

    def sixteen(area: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        """(blocks, ..., 16 numbers) -> (rows, groups)."""
        if area is None or area.shape[-1] == 0 or dtype is None:
            return None
        numbers = area.contiguous().view(dtype).flatten(1, -2)  # (blocks, groups, 16)
        if dtype is torch.uint8:
            numbers = torch.cat((numbers & 15, numbers >> 4), -1)
        return numbers.transpose(1, 2).reshape(-1, numbers.shape[1])[: d.rows].contiguous()

    f16 = torch.float16
    return Unpacked(
        _unpack_codes(units[..., header_size:], d)[: d.rows, :columns].contiguous(),
        sixteen(None if head is None else head[..., : d.scale_size], scale_dtype),
        sixteen(None if head is None else head[..., d.scale_size :], addend_dtype),
        sixteen(outer[..., :32], f16) if d.super_size else None,
        sixteen(outer[..., 32:], f16) if d.super_size == 64 else None,
    )


def _columns(width: int) -> list[int]:
    """Where each column of a tile stands among the fields of ``width`` bits: line by line, low bits first."""
    per_byte = 8 // width
    places = []
    for column in range(COLUMNS):
        pair = column // 2
        operand, side = pair // 4 * 2 + pair % 2, pair // 2 % 2
        field = operand % per_byte + per_byte * side
        places.append((operand // per_byte * 2 * per_byte + field) * 2 + column % 2)
    return places


def _bits(numbers: Tensor) -> Tensor:
    """uint8 (..., n) -> (..., 8 n), low bits first."""
    return (numbers.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _grid_bytes(tiles: Tensor, grid: Grid) -> Tensor:
    """uint8 (tiles, bytes) -> (tiles, rows, columns), each as ``Parts`` has it."""
    places = torch.empty(ROWS, grid.vectors // ROWS, dtype=torch.long)
    for line in range(grid.vectors // 32):
        for word in range(32):
            place = line // 2 * 64 + word // 8 * 16 + line % 2 * 8 + word % 8
            places[word // 2, line * 2 + word % 2] = place
    index = tiles[:, : grid.vectors].int()
    tail = grid.vectors // 8 * grid.bits
    for bit in range(8, grid.bits):
        plane = grid.vectors // 8 * bit
        index |= _bits(tiles[:, plane : plane + grid.vectors // 8]).int() << bit
    shares = torch.arange(grid.numbers) * grid.share
    own = (index[:, places].unsqueeze(-1) >> shares & (1 << grid.share) - 1).flatten(-2)
    if grid.shifted:
        last = _bits(tiles[:, tail:])[:, places].repeat_interleave(grid.numbers, -1)
    else:
        words = tiles[:, tail:].contiguous().view(torch.int16).int().view(-1, ROWS, 2)
        fields = words.unsqueeze(-1) >> torch.arange(16) & 1  # (tiles, rows, parity, fields)
        mixed = fields.transpose(-1, -2).flatten(-2)[..., _columns(1)]
        turns = torch.arange(COLUMNS).view(-1, grid.numbers, 2).transpose(1, 2).flatten()
        last = mixed[..., turns]
    return (own << 1 | last).to(torch.uint8)


def _unpack_codes(area: Tensor, d: Description) -> Tensor:
    """uint8 (blocks, units, bytes) -> (rows, columns)."""
    tiles = area.reshape(-1, d.tile_size)
    blocks = -(-d.rows // ROWS)
    if d.codes == DENSE_CODES["bf16"]:
        cells = tiles.contiguous().view(torch.bfloat16).view(-1, COLUMNS // 2, ROWS, 2)
        codes = cells.permute(0, 2, 1, 3).reshape(-1, ROWS, COLUMNS)
    elif d.codes in GRIDS:
        codes = _grid_bytes(tiles, GRIDS[d.codes])
    elif CODES["int8"] <= d.codes <= CODES["e5m2fnuz"]:
        # (tiles, operands, rows / 4, sides, rows % 4, parity) -> (tiles, rows, operands, sides, parity)
        cells = tiles.reshape(-1, COLUMNS // 4, ROWS // 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5)
        codes = cells.reshape(-1, ROWS, COLUMNS)[..., _columns(8)]
    elif d.codes in (DENSE_CODES["f16"], DENSE_CODES["f32"]):
        dtype = torch.float16 if d.codes == DENSE_CODES["f16"] else torch.float32
        codes = tiles.contiguous().view(dtype).view(-1, COLUMNS, ROWS).transpose(1, 2)
    else:
        codes = torch.zeros(len(tiles), ROWS, COLUMNS, dtype=torch.uint8)
        offset = 0
        for width, shift in planes(d.codes):
            size = ROWS * COLUMNS * width // 8
            words = tiles[:, offset : offset + size].contiguous().view(torch.int16).int()
            words = words.view(-1, size // 64, ROWS, 2)  # (tiles, lines, rows, parity)
            fields = torch.arange(0, 16, width)
            plane = words.unsqueeze(-1) >> fields & (1 << width) - 1  # (tiles, lines, rows, parity, fields)
            ordered = plane.permute(0, 2, 1, 4, 3).reshape(-1, ROWS, COLUMNS)[..., _columns(width)]
            codes |= (ordered << shift).to(torch.uint8)
            offset += size
    return codes.reshape(blocks, -1, ROWS, COLUMNS).transpose(1, 2).reshape(blocks * ROWS, -1)
