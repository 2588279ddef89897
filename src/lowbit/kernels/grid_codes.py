"""Codes that are indices of vectors (GGUF's IQ1 to IQ3): their tables, and in and out of packed form."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.gguf_blocks import GRID_TYPES, NIBBLES
from lowbit.kernels.packed_linear import CODES, GRIDS
from lowbit.numerics.block_layouts import grid_vectors
from lowbit.numerics.block_tables import GRIDS as GRID_TABLES
from lowbit.numerics.quantized_tensor import QuantizedTensor

_SLICE = 1 << 22  # weights of a grid taken apart at once


def low_and_high_bytes(words: Tensor) -> Tensor:
    """uint8 (2 n,): the low bytes of n words of 16 bits, then their high ones."""
    return torch.cat((words & 255, words >> 8 & 255)).to(torch.uint8)


def _numbers(name: str) -> Tensor:
    """float32 (2, values): what the numbers of a grid's vectors are worth, by the last bit."""
    kind, grid_name = GRID_TYPES[name]
    values = torch.tensor(GRID_TABLES[grid_name][3], dtype=torch.float32)
    if GRIDS[CODES[kind]].shifted:
        return torch.stack((8 * values + 1, 8 * values - 1))
    return torch.stack((values, -values))


def _vectors(name: str) -> tuple[Tensor, Tensor]:
    """int64 (vectors, numbers): which of its values each number of a grid has; and the values, int16."""
    grid_name = GRID_TYPES[name][1]
    values = torch.tensor(GRID_TABLES[grid_name][3], dtype=torch.int16)
    return torch.searchsorted(values, grid_vectors(grid_name, torch.device("cpu"))), values


@cache
def grid_table(name: str) -> Tensor:
    """uint8: the 64 bfloat16 values of planes, then the low bytes of the vectors' words and the high ones."""
    grid = GRIDS[CODES[GRID_TYPES[name][0]]]
    width, planes = (2, 3) if grid.numbers == 8 else (4, 5)
    first, second = NIBBLES[name]
    table = torch.zeros(2, 1 << planes - 1)
    numbers = _numbers(name) * (second - first) / 2  # beside scales of 2 n + 1
    table[:, : numbers.shape[1]] = numbers
    # Field by field, a pair of columns and the pair two further in the same place of the word's two bytes.
    pairs = torch.arange(grid.numbers)
    places = pairs // 4 * 2 + pairs % 2 + 8 // width * (pairs // 2 % 2)
    words = (_vectors(name)[0] << places * width).sum(1)
    bfloats = table.flatten().bfloat16().repeat(64 // table.numel()).view(torch.uint8)
    return torch.cat((bfloats, low_and_high_bytes(words)))


def to_grid(codes: Tensor, name: str) -> Tensor:
    """uint8 (rows, columns) codes of ``int8`` -> what ``Parts`` wants of a grid."""
    grid = GRIDS[CODES[GRID_TYPES[name][0]]]
    vectors, values = _vectors(name)
    shares = torch.arange(grid.numbers) * grid.share
    known = torch.zeros(1 << grid.share * grid.numbers, dtype=torch.int32)
    known[(vectors << shares).sum(1)] = torch.arange(len(vectors), dtype=torch.int32)
    signed = codes.short() - 128
    size = (signed + 4) // 8 if grid.shifted else signed.abs()
    last = (signed < 8 * size) if grid.shifted else signed < 0
    keys = torch.searchsorted(values, size, out_int32=True).unflatten(-1, (-1, grid.numbers))
    index = known[(keys << shares.int()).sum(-1)].unsqueeze(-1)
    return ((index >> shares.int() & (1 << grid.share) - 1).flatten(-2) << 1 | last).to(torch.uint8)


def from_grid(packed: Tensor, name: str) -> Tensor:
    """The inverse of ``to_grid``."""
    grid = GRIDS[CODES[GRID_TYPES[name][0]]]
    shares = torch.arange(grid.numbers) * grid.share
    index = ((packed >> 1).int().unflatten(-1, (-1, grid.numbers)) << shares.int()).sum(-1)
    numbers = _vectors(name)[0][index].flatten(-2)
    return (_numbers(name)[(packed & 1).long(), numbers] + 128).to(torch.uint8)


def taken_apart(weight: QuantizedTensor) -> QuantizedTensor:
    """A grid's weight expanded with its codes as ``Parts`` wants them, some rows at a time."""
    step = max(1, _SLICE // weight.shape[-1])
    slices = []
    for start in range(0, weight.shape[0], step):
        part = weight.rows(start, min(start + step, weight.shape[0])).expand()
        slices.append(replace(part, codes=to_grid(part.codes, weight.scheme.weight.name)))
    if len(slices) == 1:
        return slices[0]
    return replace(
        slices[0],
        shape=weight.shape,
        codes=torch.cat([part.codes for part in slices]),
        scales=tuple(torch.cat(scales) for scales in zip(*(part.scales for part in slices), strict=True)),
    )
