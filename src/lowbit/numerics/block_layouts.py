"""GGUF block types: raw block bytes -> small codes, scales and offsets (ggml's quants).

A block holds 32, 64 or 256 consecutive weights of a row. Each type is one function that takes the bytes
apart; the value of a weight is then the canonical equation,

    code_value * scale0 * scale1 + offset0 * offset1

so decoding and expanding cannot disagree. All functions take uint8 (..., blocks, bytes), on any device.

Bytes no writer produces: an MXFP4 exponent of 255 is NaN (OCP's rule; ggml reads 2^128), and the sign bit
of an NVFP4 scale is ignored.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache, partial, reduce

import torch
from torch import Tensor

from lowbit.numerics.block_tables import GRIDS
from lowbit.numerics.number_formats import NUMBER_FORMATS, BlockLayout, Expanded, NumberFormat


def _f16(pair: Tensor) -> Tensor:
    """uint8 (..., 2 n) little-endian f16 -> float32 (..., n)."""
    # A copy always: a lone block of a mapped file may be "contiguous" and lie at an odd address.
    return pair.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _u16(pair: Tensor) -> Tensor:
    """uint8 (..., 2 n) -> int32 (..., n)."""
    wide = pair.int().unflatten(-1, (-1, 2))
    return wide[..., 0] | wide[..., 1] << 8


def _u32(four: Tensor) -> Tensor:
    """uint8 (..., 4 n) -> int64 (..., n)."""
    wide = four.long().unflatten(-1, (-1, 4))
    return wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16 | wide[..., 3] << 24


def _nibbles(half: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 2 n): all low nibbles, then all high ones."""
    return torch.cat((half & 15, half >> 4), -1)


def _bits(packed: Tensor, width: int) -> Tensor:
    """(..., n) bytes -> (..., 8 / width, n): plane j holds bits j * width of every byte."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(-2) >> shifts.unsqueeze(-1) & (1 << width) - 1


def _each_bit(packed: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 8 n) bits, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)


# ---- 32 weights a block ----


def _q4_0(b: Tensor) -> Expanded:
    return Expanded("int4", _nibbles(b[..., 2:]), (32,), (_f16(b[..., :2]),))


def _q4_1(b: Tensor) -> Expanded:
    return Expanded("uint4", _nibbles(b[..., 4:]), (32,), (_f16(b[..., :2]),), (_f16(b[..., 2:4]),))


def _q5_codes(high: Tensor, low: Tensor) -> Tensor:
    return _nibbles(low) | _each_bit(high) << 4


def _q5_0(b: Tensor) -> Expanded:
    return Expanded("int5", _q5_codes(b[..., 2:6], b[..., 6:]), (32,), (_f16(b[..., :2]),))


def _q5_1(b: Tensor) -> Expanded:
    codes = _q5_codes(b[..., 4:8], b[..., 8:])
    return Expanded("uint5", codes, (32,), (_f16(b[..., :2]),), (_f16(b[..., 2:4]),))


def _q8_0(b: Tensor) -> Expanded:
    return Expanded("int8", b[..., 2:] ^ 128, (32,), (_f16(b[..., :2]),))


def _iq4_nl(b: Tensor) -> Expanded:
    return Expanded("iq4_nl_codes", _nibbles(b[..., 2:]), (32,), (_f16(b[..., :2]),))


def _mxfp4(b: Tensor) -> Expanded:
    scale = NUMBER_FORMATS["e8m0"].table(b.device)[b[..., :1].int()]
    return Expanded("e2m1", _nibbles(b[..., 1:]), (32,), (scale,))


def _nvfp4(b: Tensor) -> Expanded:
    """Four sub-blocks of 16, each with a ue4m3 scale; 0 and 0x7F mean a scale of zero."""
    raw = b[..., :4]
    table = NUMBER_FORMATS["e4m3"].table(b.device).nan_to_num(0.0)
    codes = _nibbles(b[..., 4:].unflatten(-1, (4, 8))).flatten(-2)
    return Expanded("e2m1", codes, (16,), (table[(raw & 127).int()],))


# ---- K-quants: 256 weights, two levels ----


def _q2_k(b: Tensor) -> Expanded:
    # Byte 32 c + l holds elements l, l + 32, l + 64, l + 96 of 128-chunk c.
    codes = _bits(b[..., 16:80].unflatten(-1, (2, 32)), 2).flatten(-3)
    scales, mins = b[..., :16] & 15, b[..., :16] >> 4
    d, dmin = _f16(b[..., 80:82]), _f16(b[..., 82:84])
    return Expanded("uint2", codes, (16, 256), (scales.float(), d), (-mins.float(), dmin))


def _q3_k(b: Tensor) -> Expanded:
    low = _bits(b[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(-3)
    high = _bits(b[..., :32], 1).flatten(-2)  # bit k of byte l belongs to element 32 k + l
    packed = b[..., 96:108]
    low_scale = _nibbles(packed[..., :8])  # 16 low nibbles
    high_scale = _bits(packed[..., 8:], 2).flatten(-2)
    scales = (low_scale | high_scale << 4).float() - 32
    return Expanded("int3", low | high << 2, (16, 256), (scales, _f16(b[..., 108:110])))


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minimums."""
    first, second, third = packed.split(4, -1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    mins = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return scales.float(), mins.float()


def _q4_k(b: Tensor) -> Expanded:
    scales, mins = _scales_and_mins(b[..., 4:16])
    codes = _nibbles(b[..., 16:].unflatten(-1, (4, 32))).flatten(-2)
    d, dmin = _f16(b[..., :2]), _f16(b[..., 2:4])
    return Expanded("uint4", codes, (32, 256), (scales, d), (-mins, dmin))


def _q5_k(b: Tensor) -> Expanded:
    scales, mins = _scales_and_mins(b[..., 4:16])
    low = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).flatten(-2)
    high = _bits(b[..., 16:48], 1).flatten(-2)
    d, dmin = _f16(b[..., :2]), _f16(b[..., 2:4])
    return Expanded("uint5", low | high << 4, (32, 256), (scales, d), (-mins, dmin))


def _q6_k(b: Tensor) -> Expanded:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    high = _bits(b[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
    scales = b[..., 192:208].contiguous().view(torch.int8).float()
    return Expanded("int6", low | high << 4, (16, 256), (scales, _f16(b[..., 208:210])))


def _iq4_xs(b: Tensor) -> Expanded:
    high = _u16(b[..., 2:4])  # (..., 1)
    low = torch.stack((b[..., 4:8] & 15, b[..., 4:8] >> 4), -1).flatten(-2)
    shifts = torch.arange(0, 16, 2, device=b.device)
    scales = (low.int() | (high >> shifts & 3) << 4).float() - 32
    codes = _nibbles(b[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return Expanded("iq4_nl_codes", codes, (32, 256), (scales, _f16(b[..., :2])))


# ---- One bit and ternary ----


def _q1_0(b: Tensor) -> Expanded:
    return Expanded("binary", _each_bit(b[..., 2:]), (128,), (_f16(b[..., :2]),))


def _tq1_0(b: Tensor) -> Expanded:
    """Five trits a byte, four in the last four bytes; trit n of byte x is (x * 3^n mod 256) * 3 >> 8."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=b.device)

    def trits(packed: Tensor, count: int) -> Tensor:
        turned = packed.int().unsqueeze(-2) * powers[:count].unsqueeze(-1) & 255
        return (turned * 3 >> 8).flatten(-2)

    codes = torch.cat((trits(b[..., :32], 5), trits(b[..., 32:48], 5), trits(b[..., 48:52], 4)), -1)
    return Expanded("ternary", codes.to(torch.uint8), (256,), (_f16(b[..., 52:54]),))


def _tq2_0(b: Tensor) -> Expanded:
    codes = _bits(b[..., :64].unflatten(-1, (2, 32)), 2).flatten(-3)
    return Expanded("ternary", codes, (256,), (_f16(b[..., 64:66]),))


# ---- Lattice grids ----


@cache
def grid_vectors(name: str, device: torch.device) -> Tensor:
    """int16 (vectors, numbers in a vector)."""
    vectors, width, bits, values, text = GRIDS[name]
    packed = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    indices = _bits(packed.unsqueeze(-1), bits).squeeze(-1).flatten()
    return torch.tensor(values, dtype=torch.int16)[indices.long()].view(vectors, width).to(device)


def _signs(seven: Tensor) -> Tensor:
    """(..., n) numbers of 7 sign bits -> (..., n, 8) of +1 and -1; the eighth bit makes the parity even."""
    parity = reduce(torch.bitwise_xor, (seven >> i for i in range(7))) & 1
    return _sign_bits(seven | parity << 7)


def _sign_bits(byte: Tensor) -> Tensor:
    shifts = torch.arange(8, device=byte.device)
    return (1 - 2 * (byte.long().unsqueeze(-1) >> shifts & 1)).to(torch.int16)


def _int8(values: Tensor) -> Tensor:
    """int16 values -> offset binary codes."""
    return (values + 128).to(torch.uint8)


def _iq2_xxs(b: Tensor) -> Expanded:
    words = b[..., 2:].unflatten(-1, (8, 8))
    grid = grid_vectors("IQ2_XXS", b.device)[words[..., :4].long()]  # (..., 8, 4, 8)
    rest = _u32(words[..., 4:])  # (..., 8, 1)
    signs = _signs(rest >> torch.arange(0, 28, 7, device=b.device) & 127)
    scale = ((rest >> 28).float() + 0.5) * 0.25
    return Expanded("int8", _int8(grid * signs).flatten(-3), (32, 256), (scale.squeeze(-1), _f16(b[..., :2])))


def _nibble_scales(packed: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 2 n), low nibble first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).float()


def _iq2_xs(b: Tensor) -> Expanded:
    words = _u16(b[..., 2:66])  # (..., 32)
    values = grid_vectors("IQ2_XS", b.device)[(words & 511).long()] * _signs(words >> 9)
    scales = (_nibble_scales(b[..., 66:74]) + 0.5) * 0.25
    return Expanded("int8", _int8(values).flatten(-2), (16, 256), (scales, _f16(b[..., :2])))


def _iq2_s(b: Tensor) -> Expanded:
    high = _bits(b[..., 66:74].unsqueeze(-1), 2).flatten(-3)  # two bits for each of 32 vectors
    index = b[..., 2:34].long() | high.long() << 8
    values = grid_vectors("IQ2_S", b.device)[index] * _sign_bits(b[..., 34:66])
    scales = (_nibble_scales(b[..., 74:82]) + 0.5) * 0.25
    return Expanded("int8", _int8(values).flatten(-2), (16, 256), (scales, _f16(b[..., :2])))


def _iq3_xxs(b: Tensor) -> Expanded:
    grid = grid_vectors("IQ3_XXS", b.device)[b[..., 2:66].long()].flatten(-2)  # (..., 256)
    rest = _u32(b[..., 66:98])  # (..., 8)
    signs = _signs(rest.unsqueeze(-1) >> torch.arange(0, 28, 7, device=b.device) & 127).flatten(-3)
    scale = ((rest >> 28).float() + 0.5) * 0.5
    return Expanded("int8", _int8(grid * signs), (32, 256), (scale, _f16(b[..., :2])))


def _iq3_s(b: Tensor) -> Expanded:
    index = b[..., 2:66].long() | _each_bit(b[..., 66:74]).long() << 8
    values = grid_vectors("IQ3_S", b.device)[index].flatten(-2) * _sign_bits(b[..., 74:106]).flatten(-2)
    scales = 1 + 2 * _nibble_scales(b[..., 106:110])
    return Expanded("int8", _int8(values), (32, 256), (scales, _f16(b[..., :2])))


def _iq1(index: Tensor, minus: Tensor) -> Tensor:
    """Codes 8 g + 1, or 8 g - 1 where ``minus``: the grid's -1, 0, 1 with its shift of an eighth."""
    return _int8(
        8 * grid_vectors("IQ1_S", index.device)[index] + (1 - 2 * minus.to(torch.int16)).unsqueeze(-1)
    )


def _iq1_s(b: Tensor) -> Expanded:
    high = _u16(b[..., 34:50])  # (..., 8)
    shifts = torch.arange(0, 12, 3, device=b.device)
    index = b[..., 2:34].unflatten(-1, (8, 4)).long() | (high.unsqueeze(-1) >> shifts & 7).long() << 8
    minus = (high >> 15).unsqueeze(-1).expand(index.shape)
    scale = (2 * (high >> 12 & 7) + 1).float() / 8
    return Expanded("int8", _iq1(index, minus).flatten(-3), (32, 256), (scale, _f16(b[..., :2])))


def _iq1_m(b: Tensor) -> Expanded:
    words = _u16(b[..., 48:56]).int()  # (..., 4): 12 bits of scales each, and a quarter of the f16 d
    tops = words >> 12
    d_bits = tops[..., 0] | tops[..., 1] << 4 | tops[..., 2] << 8 | tops[..., 3] << 12
    d = d_bits.to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    scales = (words.unsqueeze(-1) >> torch.arange(0, 12, 3, device=b.device) & 7).flatten(-2)  # (..., 16)
    nibbles = torch.stack((b[..., 32:48] & 15, b[..., 32:48] >> 4), -1).flatten(-2)  # one a vector
    index = b[..., :32].long() | (nibbles & 7).long() << 8
    codes = _iq1(index, nibbles >> 3).flatten(-2)
    return Expanded("int8", codes, (16, 256), ((2 * scales + 1).float() / 8, d))


# ---- The table ----

# name: (weights, bytes, function)
_TYPES: dict[str, tuple[int, int, Callable[[Tensor], Expanded]]] = {
    "q4_0": (32, 18, _q4_0),
    "q4_1": (32, 20, _q4_1),
    "q5_0": (32, 22, _q5_0),
    "q5_1": (32, 24, _q5_1),
    "q8_0": (32, 34, _q8_0),
    "q2_k": (256, 84, _q2_k),
    "q3_k": (256, 110, _q3_k),
    "q4_k": (256, 144, _q4_k),
    "q5_k": (256, 176, _q5_k),
    "q6_k": (256, 210, _q6_k),
    "iq2_xxs": (256, 66, _iq2_xxs),
    "iq2_xs": (256, 74, _iq2_xs),
    "iq2_s": (256, 82, _iq2_s),
    "iq3_xxs": (256, 98, _iq3_xxs),
    "iq3_s": (256, 110, _iq3_s),
    "iq1_s": (256, 50, _iq1_s),
    "iq1_m": (256, 56, _iq1_m),
    "iq4_nl": (32, 18, _iq4_nl),
    "iq4_xs": (256, 136, _iq4_xs),
    "q1_0": (128, 18, _q1_0),
    "tq1_0": (256, 54, _tq1_0),
    "tq2_0": (256, 66, _tq2_0),
    "mxfp4": (32, 17, _mxfp4),
    "nvfp4": (64, 36, _nvfp4),
}


def _decode(expand: Callable[[Tensor], Expanded], blocks: Tensor) -> Tensor:
    """float32 (..., blocks, weights)."""
    parts = expand(blocks)
    weights = parts.codes.shape[-1]

    def spread(levels: tuple[Tensor, ...]) -> Tensor:
        return reduce(
            torch.mul, (level.repeat_interleave(weights // level.shape[-1], -1) for level in levels)
        )

    values = torch.take(NUMBER_FORMATS[parts.number_format].table(blocks.device), parts.codes.long())
    values = values * spread(parts.scales)
    return values + spread(parts.offsets) if parts.offsets else values


def block_formats() -> dict[str, NumberFormat]:
    """All block types as number formats called ``gguf_q4_0`` …"""
    return {
        f"gguf_{name}": NumberFormat(
            f"gguf_{name}",
            size * 8 / weights,
            block=BlockLayout(weights, size, partial(_decode, expand), expand),
        )
        for name, (weights, size, expand) in _TYPES.items()
    }
