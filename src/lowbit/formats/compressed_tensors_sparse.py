"""The sparse layouts of compressed-tensors before 0.15: a bit mask beside the values, and Marlin 2:4.

Bit mask (``sparse-bitmask``, ``sparse-24-bitmask``): bit k of ``bitmask[r, j]`` says that column 8 j + k of
row r has a value; ``compressed`` holds the values in row order. The values are floats, or the codes of a
weight that is also quantized.

Marlin 2:4 (``marlin-24``, 4 or 8 bits, symmetric): of each four columns two are kept. ``meta`` says which,
four bits a quad: the low two the first kept column, the high two the second. The kept codes, (in / 2, out),
are cut into tiles of 16 x 16, four tiles side by side shuffled for tensor cores, and packed 8 or 4 a word:

    weight_packed (in / 32, 16 out bits / 32) I32 · scale_packed (groups, out) F16 · meta (in / 32, 2 out) I16

Grouped scales are shuffled by (0 4 1 5 2 6 3 7) within 8 columns, but only where the group is smaller than
in / 2: with exactly two groups they lie in order. The tool writes this layout and never reads it.

Sources: compressed-tensors 0.12.2; "MARLIN" (Frantar et al., 2024); CUTLASS ``reorder_meta`` (NVIDIA).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError, thousands
from lowbit.numerics.bit_packing import unpack_bits, unpack_words

_TILE = 16
_SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def scatter_bitmask(values: Tensor, bitmask: Tensor, shape: tuple[int, int], origin: str) -> Tensor:
    """(out, in) in the values' dtype: each value at its set bit, zeros elsewhere."""
    kept = unpack_bits(bitmask.view(torch.uint8), 1, shape[1]).bool()  # (out, in)
    count = int(kept.sum())
    if count != values.numel():
        raise LowbitError(
            "E0213",
            f"{origin}: the bit mask keeps {thousands(count)} weights but {thousands(values.numel())} values "
            "are stored; the file is damaged",
        )
    stored = values.flatten().view(torch.uint8) if values.element_size() == 1 else values.flatten()
    dense = torch.zeros(shape, dtype=stored.dtype)
    dense[kept] = stored
    return dense.view(values.dtype)


def unpack_marlin24(packed: Tensor, meta: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """uint8 codes (out, in) in offset binary; columns that were not kept hold the code of zero."""
    out, columns = shape
    kept = unpack_words(packed, bits, packed.shape[1] * 32 // bits)  # (in / 32, 16 out)
    order = _tile_order(bits)
    tiles = torch.empty_like(kept).view(-1, order.numel())
    tiles[:, order] = kept.reshape(-1, order.numel())
    halves = tiles.view(columns // 32, out // _TILE, _TILE, _TILE).transpose(1, 2)
    halves = halves.reshape(columns // 2, out).T  # (out, in / 2)
    first, second = _kept_columns(meta, shape)
    quads = torch.full((out, columns // 4, 4), 1 << bits - 1, dtype=torch.uint8)
    pairs = halves.reshape(out, columns // 4, 2)
    quads.scatter_(2, first.unsqueeze(-1), pairs[..., :1])
    quads.scatter_(2, second.unsqueeze(-1), pairs[..., 1:])
    return quads.view(out, columns)


def unpack_marlin24_scales(packed: Tensor, group: int, columns: int) -> Tensor:
    """(out, groups) from ``scale_packed`` (groups, out)."""
    if group and group < columns // 2:
        packed = unshuffle_marlin24_scales(packed)
    return packed.T.contiguous()


def unshuffle_marlin24_scales(packed: Tensor) -> Tensor:
    """(groups, out) in the kernel's order -> in the rows'."""
    shuffled = packed.reshape(-1, 8)
    order = torch.tensor(_SCALE_ORDER)
    return torch.empty_like(shuffled).index_copy_(1, order, shuffled).view(packed.shape)


@cache
def _tile_order(bits: int) -> Tensor:
    """Where in four tiles side by side (1024 values, row-major) stored value i comes from."""
    order: list[int] = []
    for lane in range(32):
        column = lane // 4
        base = column // 2 * 256 + 8 * (column % 2)
        rows = [2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4) + 8, 2 * (lane % 4) + 9]
        places = [16 * row + base + 4 * block for block in (0, 1) for row in rows]
        order += [place + shift for shift in range(4) for place in places]
    interleave = torch.tensor(_INTERLEAVE[bits])
    return torch.tensor(order).view(-1, interleave.numel())[:, interleave].flatten()


def _kept_columns(meta: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """int64 (out, in / 4) twice: the first and second column kept of each quad."""
    out, columns = shape
    width = columns // 16  # 16-bit words a row, four quads each
    row = torch.arange(out).unsqueeze(1).expand(out, width)
    column = torch.arange(width).expand(out, width)
    # CUTLASS's order for 16-bit meta: rows interleaved within 64 (8 within 32), then 2 x 2 blocks swapped
    # across their diagonal, columns stored in pairs.
    place = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 32 % 4 // 2 * 32 + row % 64 // 8 * 4
    swap = ((place % 2 == 0) & (column % 2 == 1)).long() - ((place % 2 == 1) & (column % 2 == 0)).long()
    place, column = place + swap, column - swap
    offsets = column // 2 * out * 2 + place * 2 + column % 2
    words = meta.reshape(-1)[offsets.flatten()].int().view(out, width) & 0xFFFF
    quads = words.unsqueeze(-1) >> torch.tensor([0, 4, 8, 12]) & 0xF
    quads = quads.flatten(1).long()  # (out, in / 4)
    return quads & 3, quads >> 2
