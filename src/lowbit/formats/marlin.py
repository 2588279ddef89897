"""Marlin-serialised 4-bit weights, of GPTQ (``B``, ``s``) and AWQ (``qweight``, ``scales``) checkpoints.

    B  I32 [in / 16, out * 2]     s  F16 [groups, out]     symmetric, group 128 or the whole input

The codes (unsigned, zero 8) of each 16 x 16 tile are permuted for tensor-core fragments: tiles are laid out
row by row, 1024 codes (4 tiles) at a time are taken in ``_CODE_ORDER``, and 8 of them fill a word, low nibble
first. Scales are permuted in runs of 64 (grouped) or 32 (per channel). Reading is the inverse. Source: the
Marlin kernel (Frantar et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import origin_of
from lowbit.formats.partly_dense import refuse_stack
from lowbit.numerics.bit_packing import unpack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_TILE = 16
_SCALE_DTYPES = {"F16": "f16", "BF16": "bf16"}


def code_order(rows: int, interleaved: tuple[int, ...]) -> Tensor:
    """int64 (1024,): which code of four tiles stands at each place.

    ``rows``: how many of a lane's four lie next to each other; ``interleaved``: which of 8 codes is where in
    a word.
    """
    order: list[int] = []
    for lane in range(32):
        start, column = lane % 4 * rows, lane // 4
        found = [start + step % rows + step // rows * 8 for step in range(4)]
        first = [16 * row + column + 8 * block for block in (0, 1) for row in found]
        for tile in range(4):
            order += [place + 256 * tile for place in first]
    return torch.tensor(order).view(-1, 8)[:, list(interleaved)].flatten()


def codes_in_rows(words: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
    """I32 [in / 16, out * 2] -> uint8 codes (out, in)."""
    out, columns = shape
    fields = unpack_words(words, 4, out * _TILE)  # (in / 16, out * 16)
    blocks = torch.empty_like(fields).view(-1, order.numel())
    blocks[:, order] = fields.reshape(-1, order.numel())
    tiles = blocks.view(columns // _TILE, out // _TILE, _TILE, _TILE)
    return tiles.permute(1, 3, 0, 2).reshape(out, columns)


def scales_in_rows(stored: Tensor, grouped: bool) -> Tensor:
    """[groups, out] in the kernel's order -> (out, groups)."""
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    if grouped:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    scales = torch.empty_like(stored).view(-1, len(order))
    scales[:, order] = stored.reshape(-1, len(order))
    return scales.view(stored.shape).T.contiguous()


_CODE_ORDER = code_order(2, (0, 2, 4, 6, 1, 3, 5, 7))


def _names(header: CheckpointHeader, module: StoredModule) -> tuple[str, str]:
    return ("B", "s") if module.tensor("B") in header.tensors else ("qweight", "scales")


def _entries(header: CheckpointHeader, module: StoredModule) -> tuple[TensorEntry, TensorEntry]:
    out, columns = module.shape
    refuse_stack(module, "Marlin packing")
    codes, scales = _names(header, module)
    what = "a Marlin-packed module"
    packed = entry_of(header, module, codes, ("I32",), what)
    if columns % _TILE or out % 64:
        raise LowbitError(
            "E0213",
            f"{packed.file.name}: {module.stored!r} is {out} x {columns}; Marlin packs multiples of 64 x 16",
        )
    check_shape(packed, (columns // _TILE, out * 2), what)
    scale = entry_of(header, module, scales, tuple(_SCALE_DTYPES), what)
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if groups not in (1, columns // 128):
        check_shape(scale, (max(columns // 128, 1), out), what)
    check_shape(scale, (groups, out), what)
    return packed, scale


def marlin_scheme(header: CheckpointHeader, module: StoredModule) -> Scheme:
    """int4, group 128 or per channel."""
    _, scale = _entries(header, module)
    block = (1, 0) if scale.shape[0] == 1 else (1, 128)
    return Scheme(number_format("int4"), (block,), (number_format(_SCALE_DTYPES[scale.dtype]),))


def marlin_tensors(header: CheckpointHeader, module: StoredModule) -> list[str]:
    """Codes and scales."""
    return [module.tensor(suffix) for suffix in _names(header, module)]


def read_marlin(header: CheckpointHeader, module: StoredModule, data: TensorData) -> QuantizedTensor:
    """The codes and scales in plain order."""
    packed, scale = _entries(header, module)
    codes = codes_in_rows(data.tensor(packed.name), _CODE_ORDER, module.shape)
    stored = finite_scales(header, scale.name, data.tensor(scale.name))
    return QuantizedTensor(
        marlin_scheme(header, module),
        module.shape,
        codes.contiguous(),
        (scales_in_rows(stored, scale.shape[0] > 1),),
        origin=origin_of(header, module, _names(header, module)[0]),
    )
