"""Writing K and V into pages, quantized on the device (Triton).

What is stored are the codes and scales of ``numerics.cache_format``, bit for bit: divisions are correctly
rounded (``div_rn``; Triton's ``/`` is not), scales are rounded by their bits, and 8-bit floats by whole
numbers, because Ampere has no instruction for e4m3.

A vector is handled as (groups, channels of a group), each padded to a power of two, so that a scale is a
reduction along one axis whatever the size of a head and of its groups. A program takes some tokens of one
head; a step writes a few megabytes at most, and one launch does K and V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast

INFINITY = tl.constexpr(0x7F800000)  # the bits of float32's; those of NaN are larger


@triton.jit
def _away_from_zero(x):  # type: ignore[no-untyped-def]
    """The nearest bfloat16 number that is no smaller in magnitude, as float32."""
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _shortened(x):  # type: ignore[no-untyped-def]
    """float32 numbers that bfloat16 holds, as bfloat16: by their bits, so that subnormal ones stay."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _rounded_down(x):  # type: ignore[no-untyped-def]
    """The nearest bfloat16 number that is no larger, as float32."""
    towards_zero = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x < 0, _away_from_zero(x), towards_zero)


@triton.jit
def _nearest_whole(x):  # type: ignore[no-untyped-def]
    """int32 of |x| < 2^22, ties to even: at 1.5 * 2^23 the last bit of a float32 number counts ones."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 codes of float32 x within reach, ties to even; NaN becomes 0x7F with x's sign."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number codes are evenly spaced: the float32 numbers from UNIT on, to 2 * UNIT,
    # have that same spacing, so adding UNIT rounds.
    UNIT: tl.constexpr = 1 - BIAS - MANTISSA + 23
    unit = tl.full(x.shape, (127 + UNIT) << 23, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + unit).to(tl.int32, bitcast=True)
    subnormal -= (127 + UNIT) << 23
    code = tl.where(magnitude < (128 - BIAS) << 23, subnormal, normal)
    code = tl.where(magnitude > INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    """The bits of |x|."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _within(x, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """x clamped; comparisons keep NaN, which a minimum would not."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def _quotients(x, scale):  # type: ignore[no-untyped-def]
    """x (T, G, C) over scale (T, G), zeros where the scale is no number to divide by."""
    divides = (scale > 0) & (scale < float("inf"))
    divisor = tl.where(divides, scale, 1.0)[:, :, None]
    quotients = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    return tl.where(divides[:, :, None], quotients, 0.0)


@triton.jit
def _store_pairs(  # type: ignore[no-untyped-def]
    vectors,
    codes,
    scales,
    row,
    written,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    """int4: two neighbours share a byte; they are loaded apart and never shuffled."""
    group = tl.arange(0, GROUPS_BLOCK)
    pair = tl.arange(0, GROUP_BLOCK // 2)[None, None, :]
    byte = group[None, :, None] * (GROUP // 2) + pair
    present = (pair < GROUP // 2) & (byte < DIM // 2) & written[:, None, None]
    even = tl.load(vectors + 2 * byte, present, 0.0).to(tl.float32)
    odd = tl.load(vectors + 2 * byte + 1, present, 0.0).to(tl.float32)
    low = _rounded_down(tl.min(tl.where(present, tl.minimum(even, odd), float("inf")), 2))
    highest = tl.max(tl.where(present, tl.maximum(even, odd), -float("inf")), 2)
    scale = _away_from_zero(tl.div_rn(highest - low, tl.full(low.shape, 15.0, tl.float32)))
    largest = tl.max(tl.where(present, tl.maximum(_magnitude(even), _magnitude(odd)), 0), 2)
    scale = tl.where(largest < INFINITY, scale, float("nan"))
    first = _nearest_whole(_quotients(even - low[:, :, None], scale))
    second = _nearest_whole(_quotients(odd - low[:, :, None], scale))
    tl.store(codes + row[:, None, None] * (DIM // 2) + byte, (first | (second << 4)).to(tl.uint8), present)
    kept = written[:, None] & (group[None, :] < GROUPS)
    place = scales + (row[:, None] * GROUPS + group[None, :]) * 2
    tl.store(place, _shortened(scale), kept)
    tl.store(place + 1, _shortened(low), kept)


@triton.jit
def _store_numbers(  # type: ignore[no-untyped-def]
    vectors,
    codes,
    scales,
    row,
    written,
    FORMAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    """Every format but int4."""
    group = tl.arange(0, GROUPS_BLOCK)
    inner = tl.arange(0, GROUP_BLOCK)[None, None, :]
    channel = group[None, :, None] * GROUP + inner
    present = (inner < GROUP) & (channel < DIM) & written[:, None, None]
    numbers = tl.load(vectors + channel, present, 0.0).to(tl.float32)
    if DYNAMIC:
        REACH: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0 if FORMAT == "fp8_e4m3" else 57344.0
        # The bits of magnitudes are ordered as they are, infinity and NaN above all.
        largest = tl.max(tl.where(present, _magnitude(numbers), 0), 2)
        reach = tl.full(largest.shape, REACH, tl.float32)
        scale = _away_from_zero(tl.div_rn(largest.to(tl.float32, bitcast=True), reach))
        scale = tl.where(largest < INFINITY, scale, float("nan"))
        numbers = _quotients(numbers, scale)
        place = scales + row[:, None] * GROUPS + group[None, :]
        tl.store(place, _shortened(scale), written[:, None] & (group[None, :] < GROUPS))
    place = codes + row[:, None, None] * DIM + channel
    if FORMAT == "int8":
        tl.store(place, _nearest_whole(numbers).to(tl.int8), present)
    elif FORMAT == "fp8_e4m3":
        tl.store(place, _float8(_within(numbers, 448.0), 3, 7), present)
    elif FORMAT == "fp8_e5m2":
        tl.store(place, _float8(_within(numbers, 57344.0), 2, 15), present)
    elif FORMAT == "fp16":
        tl.store(place, _within(numbers, 65504.0).to(tl.float16), present)
    elif FORMAT == "bf16":
        tl.store(place, cast(numbers, tl.bfloat16), present)
    else:
        tl.store(place, numbers, present)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    vectors,
    codes,
    scales,
    row,
    written,
    FORMAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    """Vectors (T, 1, 1 of addresses) to ``row`` (T,) of codes and scales."""
    if FORMAT == "int4":
        _store_pairs(vectors, codes, scales, row, written, DIM, GROUP, GROUPS, GROUP_BLOCK, GROUPS_BLOCK)
    else:
        _store_numbers(
            vectors,
            codes,
            scales,
            row,
            written,
            FORMAT,
            DYNAMIC,
            DIM,
            GROUP,
            GROUPS,
            GROUP_BLOCK,
            GROUPS_BLOCK,
        )


@triton.jit(do_not_specialize=["tokens"])
def write(  # type: ignore[no-untyped-def]
    k,
    v,
    k_codes,
    k_scales,
    v_codes,
    v_scales,
    slots,
    tokens,
    all_slots,
    k_token,
    k_head,
    v_token,
    v_head,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    LATENT: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_DYNAMIC: tl.constexpr,
    K_DIM: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_GROUP_BLOCK: tl.constexpr,
    K_GROUPS_BLOCK: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_DYNAMIC: tl.constexpr,
    V_DIM: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_GROUP_BLOCK: tl.constexpr,
    V_GROUPS_BLOCK: tl.constexpr,
):
    """k and v (tokens, heads, dim) to ``slots`` (tokens,); a slot outside the cache is not written.

    Grid: (tokens / TOKENS, heads). Pages are (pages, heads, PAGE, ...); ``all_slots`` is pages * PAGE.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, token < tokens, -1).to(tl.int64)
    written = (slot >= 0) & (slot < all_slots)
    row = (slot // PAGE * tl.num_programs(1) + head) * PAGE + slot % PAGE
    token = token.to(tl.int64)[:, None, None]
    _store(
        k + head.to(tl.int64) * k_head + token * k_token,
        k_codes,
        k_scales,
        row,
        written,
        K_FORMAT,
        K_DYNAMIC,
        K_DIM,
        K_GROUP,
        K_GROUPS,
        K_GROUP_BLOCK,
        K_GROUPS_BLOCK,
    )
    if not LATENT:
        _store(
            v + head.to(tl.int64) * v_head + token * v_token,
            v_codes,
            v_scales,
            row,
            written,
            V_FORMAT,
            V_DYNAMIC,
            V_DIM,
            V_GROUP,
            V_GROUPS,
            V_GROUP_BLOCK,
            V_GROUPS_BLOCK,
        )
