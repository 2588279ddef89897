"""The Triton kernels that quantize inputs; ``activation_quant`` says what they give and launches them.

A program has a row of x (one scale a token or a tensor) or some groups of a row's columns. All arithmetic is
IEEE float32: division rounds to nearest, codes to nearest even. Where x is rotated first by a Hadamard matrix
whose blocks a program has whole, it rotates them itself (``rotation``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import bfloat16_value, cast
from lowbit.kernels.gpu.rotation import turned, turned_in_two


@triton.jit
def size_of(x):  # type: ignore[no-untyped-def]
    """int32 bits of |x|: ordered like the numbers, infinity above them, NaN above that."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _clamp(x, low, high):  # type: ignore[no-untyped-def]
    """NaN stays."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, low), high), x)


@triton.jit
def _whole(x):  # type: ignore[no-untyped-def]
    """The nearest whole number, to even, of |x| < 2^22. x must not be a product: a fused sum rounds once."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def code_value(steps, low, high, MANTISSA: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The format's nearest value, saturating; MANTISSA 0: whole numbers."""
    x = _clamp(steps, low, high)
    if MANTISSA == 0:
        return _whole(x)
    size = size_of(x)
    below = 23 - MANTISSA  # bits that go
    normal = (size + ((1 << (below - 1)) - 1) + ((size >> below) & 1)) & -(1 << below)
    unit = 2.0 ** (24 - BIAS - MANTISSA)  # a float32 of this size ends at the smallest subnormal
    small = (size.to(tl.float32, bitcast=True) + unit) - unit
    rounded = tl.where(size >= ((128 - BIAS) << 23), normal, small.to(tl.int32, bitcast=True))
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    if BIAS < 7:  # formats of less than 8 bits: zero has no sign
        sign = tl.where(rounded == 0, 0, sign)
    return tl.where(x == x, (rounded | sign).to(tl.float32, bitcast=True), x)


@triton.jit
def _float_code(value, MANTISSA: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 code of a value of an 8-bit float format; NaN has the largest."""
    size = size_of(value)
    normal = (size >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
    small = (size.to(tl.float32, bitcast=True) * 2.0 ** (BIAS + MANTISSA - 1)).to(tl.int32)
    code = tl.where(size >= ((128 - BIAS) << 23), normal, small)
    code = tl.where(value == value, code, 0x7F)
    return (code | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """2^exponent of int32 -127 … 127; the lowest is a subnormal float32."""
    return tl.where(exponent > -127, (exponent + 127) << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(  # type: ignore[no-untyped-def]
    amax,
    limit,
    floor,
    upper_bound,
    round_up,
    emax,
    SCALE: tl.constexpr,
):
    """The scale of a block whose largest |x| is amax: ``activation_quant._scale``."""
    amax = tl.where(amax == amax, tl.minimum(amax, upper_bound), amax)
    if SCALE == "e8m0_up" or SCALE == "e8m0":
        wanted = amax
        if SCALE == "e8m0_up":  # DeepSeek's: the next power of two of amax / limit
            wanted = tl.div_rn(amax, limit)
        size = size_of(wanted)
        field, fraction = size >> 23, size & 0x7FFFFF
        if SCALE == "e8m0_up":
            exponent = field - 127 + (fraction > tl.where(field == 0, 0x400000, 0)).to(tl.int32)
        else:  # OCP's: amax's own power of two over the format's, emax the latter's exponent
            mantissa = (fraction | 0x3F800000).to(
                tl.float32, bitcast=True
            )  # 1 … 2; subnormals end at -127 anyhow
            exponent = field - 127 - emax + (mantissa >= round_up).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, -127), 127)
        exponent = tl.where(size_of(amax) == 0x7F800000, 127, exponent)
        scale = tl.where(amax == amax, _power_of_two(exponent), 1.0)
    else:
        scale = tl.div_rn(amax, limit)
        if SCALE == "bf16":
            scale = bfloat16_value(scale)
    raised = tl.where(scale == scale, tl.maximum(scale, floor), 1.0)
    return tl.where(floor > 0, raised, tl.where((scale > 0) & (amax != 0), scale, 1.0))


@triton.jit
def code_steps(x, scale, RECIPROCAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """x in units of its scale."""
    if RECIPROCAL:
        return x * tl.div_rn(1.0, scale)
    return tl.div_rn(x, scale)


@triton.jit
def columns_of(  # type: ignore[no-untyped-def]
    x, multiplier, column, columns, BF16: tl.constexpr
):
    """float32 x of a row, 0 behind its end."""
    value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
    return multiplied(value, multiplier, column, columns, BF16)


@triton.jit
def multiplied(value, multiplier, column, columns, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x of these columns as it is quantized; ``multiplier``: None for ones."""
    if multiplier is not None:
        value = value * tl.load(multiplier + column, mask=column < columns, other=0.0)
    if BF16:
        value = bfloat16_value(value)
    return value


@triton.jit
def _stored(  # type: ignore[no-untyped-def]
    code, out, there, OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr
):
    """Bytes of codes into ``out``; int32, 1 where one is NaN, which a byte cannot say."""
    broken = code != code
    if MANTISSA == 0:
        stored = tl.where(broken, 0.0, code - OFFSET).to(tl.int32).to(tl.int8)
    else:
        stored = _float_code(code, MANTISSA, BIAS)
    tl.store(out, stored, mask=there)
    return (broken & there).to(tl.int32)


@triton.jit
def find_peaks(  # type: ignore[no-untyped-def]
    x,
    multiplier,
    peaks,
    largest,
    columns,
    stride,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest |x| of each row, and of all rows that are finite, as int32 bits."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, size_of(columns_of(x + row * stride, multiplier, column, columns, BF16)))
    peak = tl.max(top, 0)
    tl.store(peaks + row, peak)
    tl.atomic_max(largest, tl.where(peak < 0x7F800000, peak, 0))


@triton.jit
def _ends_of(x, multiplier, columns, BF16: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least and the most of a row and 0; NaN where it holds one."""
    top = tl.zeros((BLOCK,), tl.int32)
    least = tl.zeros((BLOCK,), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        value = columns_of(x, multiplier, start + tl.arange(0, BLOCK), columns, BF16)
        top = tl.maximum(top, size_of(value))
        least, most = tl.minimum(least, value), tl.maximum(most, value)
    peak = tl.max(top, 0).to(tl.float32, bitcast=True)
    least, most = tl.min(least, 0), tl.max(most, 0)
    return tl.where(peak == peak, least, peak), tl.where(peak == peak, most, peak)


@triton.jit
def find_ends(  # type: ignore[no-untyped-def]
    x,
    multiplier,
    ends,  # float32 (rows, 2)
    columns,
    stride,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How far each row reaches below and above 0."""
    row = tl.program_id(0).to(tl.int64)
    least, most = _ends_of(x + row * stride, multiplier, columns, BF16, BLOCK)
    tl.store(ends + 2 * row, -least)
    tl.store(ends + 2 * row + 1, most)


@triton.jit(do_not_specialize=["rows"])
def quantize(  # type: ignore[no-untyped-def]
    x,  # (rows, columns)
    multiplier,  # float32 (columns,) or None
    given_scale,  # float32 (1,): static, the state's, or the outer scale of groups; None: there is none
    given_zero,  # float32 (1,): static, or None
    history,  # int32 view of the state's amax history; of rule "tensor" the largest of all rows
    seen,  # of rule "tensor" and with SEEN: find_peaks' int32 (rows,), of "asymmetric" find_ends' float32
    before,  # of a rotation: ``rotation.turned``
    after,
    table,
    out,  # (rows, columns)
    scales,  # float32 (rows,), of rule "grouped" (groups, rows)
    zeros,  # int32 (rows,)
    factor,  # float32 (1,)
    rows,
    columns,
    stride,
    out_stride,
    limit,
    floor,  # 0: none
    upper_bound,  # infinity: none
    round_up,
    low,
    high,
    levels,
    emax,
    divisor,  # of a rotation
    RULE: tl.constexpr,
    SEEN: tl.constexpr,  # other ranks have more columns of the rows
    SCALE: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    RAW: tl.constexpr,  # codes, whose scales say NaN; else values
    OFFSET: tl.constexpr,  # what raw whole numbers are less than the format's
    GROUP: tl.constexpr,  # columns of a group
    BLOCK: tl.constexpr,  # groups of a program, or columns it reads at a time: all, where it rotates them
    SIZE: tl.constexpr,  # columns of a block of the rotation, 0: none
    A: tl.constexpr,  # of a block that is rotated in two, else 0
    HALF: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """All rules; only that of groups has more programs than rows. One kernel, as they share most numbers."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    out += row * out_stride
    scale = 1.0
    zero = 0.0
    if RULE == "grouped":
        group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        if SIZE > 0:
            flat = tl.program_id(1) * BLOCK * GROUP + (
                tl.arange(0, BLOCK * GROUP // SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            )
            given = tl.load(x + flat, mask=flat < columns, other=0.0)
            made = turned(given, before, after, table, divisor, HALF, SIZE, SIZE, STRIDE)
            x_of = multiplied(tl.reshape(made, (BLOCK, GROUP)), multiplier, place, columns, BF16)
        else:
            x_of = columns_of(x, multiplier, place, columns, BF16)
        peak = tl.max(size_of(x_of), 1).to(tl.float32, bitcast=True)
        if SCALE == "e4m3":
            outer = 1.0
            if given_scale is not None:
                outer = tl.load(given_scale)
            inner = _clamp(tl.div_rn(peak, limit * outer), 0.001953125, 448.0)
            each = code_value(inner, -448.0, 448.0, 3, 7) * outer
            each = tl.where(each == 0, 1.0, each)
        else:
            each = scale_of(peak, limit, floor, upper_bound, round_up, emax, SCALE)
        codes = code_value(code_steps(x_of, each[:, None], RECIPROCAL), low, high, MANTISSA, BIAS)
        if RAW:
            wrong = tl.max(_stored(codes, out + place, place < columns, OFFSET, MANTISSA, BIAS), 1)
            to = scales + group.to(tl.int64) * rows + row
            tl.store(to, tl.where(wrong == 0, each, float("nan")), mask=group * GROUP < columns)
        else:
            values = cast(codes * each[:, None], out.dtype.element_ty)
            tl.store(out + place, values, mask=place < columns)
    else:
        if SIZE > 0:
            square = tl.arange(0, A)[:, None] * (SIZE // A) + tl.arange(0, SIZE // A)[None, :]
            made = turned_in_two(
                tl.load(x + square), square, before, after, table, divisor, HALF, A, SIZE // A, STRIDE
            )
            whole = multiplied(tl.reshape(made, (BLOCK,)), multiplier, tl.arange(0, BLOCK), columns, BF16)
        top = tl.zeros((BLOCK,), tl.int32)
        if RULE == "token":
            if SEEN:
                amax = tl.load(seen + row).to(tl.float32, bitcast=True)
            elif SIZE > 0:
                top = size_of(whole)
            else:
                for start in range(0, columns, BLOCK):
                    value = columns_of(x, multiplier, start + tl.arange(0, BLOCK), columns, BF16)
                    top = tl.maximum(top, size_of(value))
            if not SEEN:
                amax = tl.max(top, 0).to(tl.float32, bitcast=True)
            scale = scale_of(amax, limit, floor, upper_bound, round_up, emax, SCALE)
        elif RULE == "asymmetric":
            if SEEN:
                least, most = -tl.load(seen + 2 * row), tl.load(seen + 2 * row + 1)
            else:
                least, most = _ends_of(x, multiplier, columns, BF16, BLOCK)
            scale = tl.div_rn(most - least, levels - 1)
            scale = tl.where(scale == 0, 1.0, scale)
            zero = _whole(_clamp(-levels * 0.5 - tl.div_rn(least, scale), -levels * 0.5, levels * 0.5 - 1))
        elif RULE == "tensor":
            amax = tl.load(history).to(tl.float32, bitcast=True)
            scale = scale_of(amax, limit, floor, upper_bound, round_up, emax, SCALE)
            finite = tl.load(seen + row) < 0x7F800000
            if row == 0:
                tl.store(factor, scale)
        elif RULE == "static" or RULE == "delayed":
            scale = tl.load(given_scale)
            if given_zero is not None:
                zero = tl.load(given_zero)

        ZERO: tl.constexpr = given_zero is not None or RULE == "asymmetric"
        bad = tl.zeros((BLOCK,), tl.int32)
        top = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = whole if SIZE > 0 else columns_of(x, multiplier, column, columns, BF16)
            if RULE == "none":
                code = value
            elif RULE == "delayed":
                top = tl.maximum(top, size_of(value))
                code = code_value(value * scale, low, high, MANTISSA, BIAS)
            else:
                steps = code_steps(value, scale, RECIPROCAL)
                if RULE == "static":  # an input that was never seen in calibration has a scale of zero
                    steps = tl.where(scale == 0, 0.0, steps)
                if ZERO:
                    steps += zero
                code = code_value(steps, low, high, MANTISSA, BIAS)
                if RULE == "tensor":
                    code = tl.where(finite, code, float("nan"))
            there = column < columns
            if RAW:
                bad = bad | _stored(code, out + column, there, OFFSET, MANTISSA, BIAS)
            else:
                if ZERO:
                    code -= zero
                tl.store(out + column, cast(code, out.dtype.element_ty), mask=there)

        if RULE == "delayed":
            tl.atomic_max(history, tl.max(top, 0))
            scale = tl.div_rn(1.0, scale)
            if row == 0:
                tl.store(factor, scale)
        if RAW:
            tl.store(scales + row, tl.where(tl.max(bad, 0) == 0, scale, float("nan")))
            if ZERO or OFFSET != 0:
                zero -= OFFSET
                tl.store(zeros + row, tl.where(zero == zero, zero, 0.0).to(tl.int32))
        elif RULE == "token" or RULE == "asymmetric":
            tl.store(scales + row, scale)


@triton.jit
def update_delayed(states, largest, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``ActivationState.update`` of many states: int64 (states, 4) of addresses, length, most recent only."""
    state = states + tl.program_id(0) * 4
    at = tl.load(state).to(tl.pointer_type(tl.float32))
    history = tl.load(state + 1).to(tl.pointer_type(tl.float32))
    length = tl.load(state + 2).to(tl.int32)
    slot = tl.arange(0, BLOCK)
    seen = tl.load(history + slot, mask=slot < length, other=0.0)
    moved = tl.load(history + slot + 1, mask=slot + 1 < length, other=0.0)
    newest = tl.load(history + slot * 0)
    amax = tl.max(size_of(seen), 0).to(tl.float32, bitcast=True)
    amax = tl.where(tl.load(state + 3 + slot * 0) == 0, amax, newest)
    tl.debug_barrier()  # all is read before anything is written
    used = newest != 0
    moved = tl.where(slot == length - 1, newest, moved)
    moved = tl.where(slot == 0, 0.0, moved)
    tl.store(history + slot, moved, mask=(slot < length) & used)
    scale = tl.minimum(tl.div_rn(tl.load(largest + tl.program_id(0)), amax), 3.4028234663852886e38)
    known = used & (amax > 0) & (size_of(amax) < 0x7F800000)
    tl.store(at + slot, scale, mask=known & (slot == 0))
