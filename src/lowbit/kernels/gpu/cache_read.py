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

from lowbit.kernels.gpu.language import INTERPRETED, cast


@triton.jit
def as_type(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x as what is multiplied: "f32", "fp16" or "bf16"."""
    if TYPE == "bf16":
        x = cast(x, tl.bfloat16)
    elif TYPE == "fp16":
        x = x.to(tl.float16)
    return x


@triton.jit
def _whole(codes):  # type: ignore[no-untyped-def]
    """float32 of uint8 below 2^7: as the last bits of 2^23, where a float32 counts ones. No conversion."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _numbers(codes, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 numbers that codes of 8 bits or more stand for."""
    if FORMAT == "fp8_e4m3":
        bits = codes.to(tl.int32)
        numbers = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
        # 2^120 makes up for the exponents' different bias.
        numbers = tl.where((bits & 0x7F) == 0x7F, float("nan"), numbers * 1.329227995784916e36)
    elif FORMAT == "fp8_e5m2":
        numbers = (codes.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        numbers = codes.to(tl.float32)
    return numbers


@triton.jit
def _of_groups(  # type: ignore[no-untyped-def]
    numbers,
    scales,
    row,
    inside,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    STORED: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Float32 codes (N, WIDTH) times their groups' scales, plus the lowest values where OFFSET."""
    PARAMETERS: tl.constexpr = 2 if OFFSET else 1
    GROUPS: tl.constexpr = (STORED + GROUP - 1) // GROUP
    END: tl.constexpr = min(START + WIDTH, DIM)
    first = scales + row * (GROUPS * PARAMETERS)
    if START // GROUP == (END - 1) // GROUP:  # one for the whole tile
        place = (first + START // GROUP * PARAMETERS)[:, None]
        numbers *= tl.load(place, inside[:, None], 0.0).to(tl.float32)
        if OFFSET:
            numbers += tl.load(place + 1, inside[:, None], 0.0).to(tl.float32)
    elif (GROUP & (GROUP - 1)) == 0 and START % GROUP == 0 and WIDTH % GROUP == 0:
        group = START // GROUP + tl.arange(0, WIDTH // GROUP)
        place = first[:, None] + group[None, :] * PARAMETERS
        present = inside[:, None] & (group < GROUPS)[None, :]
        grouped = tl.reshape(numbers, (numbers.shape[0], WIDTH // GROUP, GROUP))
        grouped *= tl.load(place, present, 0.0).to(tl.float32)[:, :, None]
        if OFFSET:
            grouped += tl.load(place + 1, present, 0.0).to(tl.float32)[:, :, None]
        numbers = tl.reshape(grouped, (numbers.shape[0], WIDTH))
    else:  # sizes that no model is known to have: a scale is read for every channel
        channel = START + tl.arange(0, WIDTH)
        place = first[:, None] + (channel // GROUP)[None, :] * PARAMETERS
        present = inside[:, None] & (channel < DIM)[None, :]
        numbers *= tl.load(place, present, 0.0).to(tl.float32)
        if OFFSET:
            numbers += tl.load(place + 1, present, 0.0).to(tl.float32)
    return numbers


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
    PACKED: tl.constexpr = 2 if FORMAT == "int4" else 1
    place = START // PACKED + tl.arange(0, WIDTH // PACKED)
    present = inside[:, None]
    if START + WIDTH > DIM:
        present = present & (place < DIM // PACKED)[None, :]
    loaded = tl.load(codes + row[:, None] * (STORED // PACKED) + place[None, :], present, 0)
    if FORMAT == "int4":
        numbers = tl.interleave(_whole(loaded & 15), _whole(loaded >> 4))
        numbers = _of_groups(numbers, scales, row, inside, START, WIDTH, DIM, STORED, True, GROUP)
        numbers = as_type(numbers, TYPE)
    elif GROUP > 0:
        numbers = _numbers(loaded, FORMAT)
        numbers = _of_groups(numbers, scales, row, inside, START, WIDTH, DIM, STORED, False, GROUP)
        numbers = as_type(numbers, TYPE)
    elif FORMAT == TYPE:
        numbers = loaded
    elif FORMAT == "int8" and not INTERPRETED:  # in one instruction; the interpreter would copy bits
        numbers = loaded.to(tl.bfloat16)
    else:
        numbers = as_type(_numbers(loaded, FORMAT), TYPE)
    return numbers
