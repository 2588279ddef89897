"""n-bit codes <-> bytes and 32-bit words. Order and direction are arguments, the rule is one.

*Dense* packing is a little-endian bit stream: code k occupies bits [b k, b (k + 1)) of the stream made of
consecutive bytes or words, lowest bit first; codes may straddle a border. *Padded* packing puts 32 // b codes
in a word and leaves its top bits unused (compressed-tensors before 0.17 for 3, 5, 6 and 7 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., n) below 2^bits -> uint8 (..., ceil(n bits / 8)), dense."""
    if bits == 8:
        return codes
    if 8 % bits == 0:
        return _pack_whole(codes, bits)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes.unsqueeze(-1) >> shifts & 1).flatten(-2)  # (..., n bits)
    return _pack_whole(stream, 1)


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """Codes whose width divides a byte."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    grouped = padded.unflatten(-1, (-1, per_byte))
    packed = grouped[..., 0].clone()
    for slot in range(1, per_byte):
        packed |= grouped[..., slot] << bits * slot
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 (..., bytes) -> uint8 codes (..., count): the inverse of ``pack_bits``."""
    if bits == 8:
        return packed[..., :count]
    if 8 % bits == 0:
        return _unpack_whole(packed, bits)[..., :count]
    stream = _unpack_whole(packed, 1)[..., : count * bits].unflatten(-1, (count, bits))
    codes = stream[..., 0].clone()
    for place in range(1, bits):
        codes |= stream[..., place] << place
    return codes


def _unpack_whole(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)


def words_to_bytes(words: Tensor, dim: int = -1) -> Tensor:
    """int32 words -> their four little-endian bytes, along ``dim`` moved to the end."""
    words = words.movedim(dim, -1).contiguous()
    if words.stride(-1) != 1:  # a single word counts as contiguous whatever its stride
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def unpack_words(
    words: Tensor,
    bits: int,
    count: int,
    *,
    dim: int = -1,
    order: tuple[int, ...] | None = None,
    padded: bool = False,
) -> Tensor:
    """int32 words -> uint8 codes, ``count`` of them along ``dim``.

    ``order``: where the fields of a word do not come in sequence, the field of logical code 0, 1, … of a
    word (AWQ: 0, 4, 1, 5, 2, 6, 3, 7). ``padded``: 32 // bits codes a word, its top bits unused.
    """
    raw = words_to_bytes(words, dim)  # (..., 4 words)
    if padded and 32 % bits:
        fields = 32 // bits
        stream = _unpack_whole(raw, 1).unflatten(-1, (-1, 32))[..., : fields * bits]
        codes = unpack_bits(_pack_whole(stream, 1), bits, fields).flatten(-2)
    else:
        codes = unpack_bits(raw, bits, raw.shape[-1] * 8 // bits)
    if order is not None:
        codes = codes.unflatten(-1, (-1, len(order)))[..., list(order)].flatten(-2)
    return codes[..., :count].movedim(-1, dim)


def pack_words(
    codes: Tensor, bits: int, *, dim: int = -1, order: tuple[int, ...] | None = None, padded: bool = False
) -> Tensor:
    """uint8 codes -> int32 words along ``dim``: the inverse of ``unpack_words``, zero-filled."""
    codes = codes.movedim(dim, -1)
    group = len(order) if order else 32 // bits if padded or 32 % bits == 0 else 32
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % group))
    if order is not None:
        inverse = torch.tensor(order, device=codes.device).argsort()
        codes = codes.unflatten(-1, (-1, group))[..., inverse].flatten(-2)
    if padded and 32 % bits:
        stream = _unpack_whole(pack_bits(codes.unflatten(-1, (-1, group)), bits), 1)[..., : group * bits]
        raw = _pack_whole(torch.nn.functional.pad(stream, (0, 32 - group * bits)), 1).flatten(-2)
    else:
        raw = pack_bits(codes, bits)
        raw = torch.nn.functional.pad(raw, (0, -raw.shape[-1] % 4))
    # A copy always: with axes of one element any strides count as contiguous, and a view needs its own.
    raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(torch.int32).movedim(-1, dim)
