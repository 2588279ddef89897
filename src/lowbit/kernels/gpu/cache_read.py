"""Reading tiles of K and V from pages, their codes decoded in registers (Triton).

Whole-number codes of at most 8 bits and both 8-bit floats are exact in bfloat16, so where one scale spans a
head's vector codes are multiplied as they are, and the caller applies the scale to float32 sums. Scales of
groups of channels (int4, quantized latents) are applied here: code * scale + low, rounded once to the type
that is multiplied.

e4m3 is decoded by shifting its bits into a float32's and multiplying by 2^120, e5m2 as the upper byte of a
float16: Ampere has no instruction for e4m3. Both are exact, subnormal numbers included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import INTERPRETED


@triton.jit
def type_of(NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """The type that is multiplied."""
    return tl.float32 if NAME == "f32" else tl.float16 if NAME == "fp16" else tl.bfloat16


@triton.jit
def _whole(codes):  # type: ignore[no-untyped-def]
    """float32 of uint8 below 2^7: as the last bits of 2^23, where a float32 counts ones. No conversion."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _numbers(codes, FORMAT: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What codes of 8 bits or more stand for, as TYPE ("f32", "fp16", "bf16")."""
    if FORMAT == "fp8_e4m3":
        bits = codes.to(tl.int32)
        numbers = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
        # 2^120 makes up for the exponents' different bias.
        numbers = tl.where((bits & 0x7F) == 0x7F, float("nan"), numbers * 1.329227995784916e36)
    elif FORMAT == "fp8_e5m2":
        numbers = (codes.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "int8" and INTERPRETED:  # it takes a whole number's bits for bfloat16's
        numbers = codes.to(tl.float32)
    else:
        numbers = codes
    return numbers.to(type_of(TYPE))


@triton.jit
def read(  # type: ignore[no-untyped-def]
    codes,
    scales,
    row,
    inside,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    STORED: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Channels START to START + WIDTH of vectors ``row`` (N,) -> (N, WIDTH) of TYPE.

    Zeros past DIM and where not ``inside`` (N,). STORED: channels a vector has in the cache. GROUP: channels
    that share a scale; 0: none, or one that the caller applies.
    """
    channel = START + tl.arange(0, WIDTH)
    if FORMAT == "int4":
        byte = START // 2 + tl.arange(0, WIDTH // 2)
        present = inside[:, None]
        if START + WIDTH > DIM:
            present = present & (byte < DIM // 2)[None, :]
        packed = tl.load(codes + row[:, None] * (STORED // 2) + byte[None, :], present, 0)
        numbers = tl.interleave(_whole(packed & 15), _whole(packed >> 4))
    else:
        present = inside[:, None]
        if START + WIDTH > DIM:
            present = present & (channel < DIM)[None, :]
        loaded = tl.load(codes + row[:, None] * STORED + channel[None, :], present, 0)
        if GROUP == 0:
            return _numbers(loaded, FORMAT, TYPE)
        numbers = _numbers(loaded, FORMAT, "f32")
    PARAMETERS: tl.constexpr = 2 if FORMAT == "int4" else 1
    GROUPS: tl.constexpr = (STORED + GROUP - 1) // GROUP
    first = scales + row * (GROUPS * PARAMETERS)
    if START // GROUP == (min(START + WIDTH, DIM) - 1) // GROUP:  # one for the whole tile
        place = (first + START // GROUP * PARAMETERS)[:, None]
        numbers *= tl.load(place, inside[:, None], 0.0).to(tl.float32)
        if FORMAT == "int4":
            numbers += tl.load(place + 1, inside[:, None], 0.0).to(tl.float32)
    elif (GROUP & (GROUP - 1)) == 0 and START % GROUP == 0 and WIDTH % GROUP == 0:
        group = START // GROUP + tl.arange(0, WIDTH // GROUP)
        place = first[:, None] + group[None, :] * PARAMETERS
        present = inside[:, None]
        if START + WIDTH > DIM:
            present = present & (group < GROUPS)[None, :]
        grouped = tl.reshape(numbers, (row.shape[0], WIDTH // GROUP, GROUP))
        grouped *= tl.load(place, present, 0.0).to(tl.float32)[:, :, None]
        if FORMAT == "int4":
            grouped += tl.load(place + 1, present, 0.0).to(tl.float32)[:, :, None]
        numbers = tl.reshape(grouped, (row.shape[0], WIDTH))
    else:  # sizes that no model is known to have: a scale is read for every channel
        place = first[:, None] + (channel // GROUP)[None, :] * PARAMETERS
        present = inside[:, None] & (channel < DIM)[None, :]
        numbers *= tl.load(place, present, 0.0).to(tl.float32)
        if FORMAT == "int4":
            numbers += tl.load(place + 1, present, 0.0).to(tl.float32)
    return numbers.to(type_of(TYPE))
