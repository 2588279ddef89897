"""Decode tiles of packed weights (``weight_layout``): functions to call inside Triton kernels.

A kernel takes ``weight_layout.arguments(buffers)``, the columns of a row, and ``Layout.constants``. It goes
through the runs of a row (``Layout.runs``): ``load_run`` reads the bytes of one, ``run_values`` makes of
each of its ``FIELDS`` tiles, column ``(run * FIELDS + field) * TILE`` on, a float32 (rows, TILE) matrix of
values, which are exact in bfloat16 but for tables such as nf4's. Behind a row's last column they are finite
numbers of no meaning: x must be 0 there. ``scale_of``, ``zero_of`` and ``offset_of`` give a tile's float32
(rows,): all columns of a tile lie in one group. So

    weight = run_values(…, zero, …) * scale[:, None] + offset[:, None]

is the canonical equation, step by step. ``rows`` must lie inside the weight (clamp them: loads have no
masks) and are int64, as what they address may exceed 2^31 bytes.

A whole number costs three instructions: its byte's shift, one that masks it and puts it into the significand
of 2^23, and a subtraction, which takes off the zero point as well. Converting integers would be done at a
quarter of that rate. A float of 4 bits costs four, of 6 bits six; looked up in a table it would be a load
from shared memory a weight, and two barriers a tile. Operands of tensor cores (``run_operands``) are made two
at a time, by instructions that Triton has no words for (``assembly``): with all else that a product of up to
16 tokens does, as assembled for Hopper, 3.2 instructions a code of 4 bits in groups of 128 (4.5 before that),
4.2 of 8 bits (7.8), 6.0 an MXFP4 (8.5), 6.7 of 3 bits and e4m3 (11.1 and 13.1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.assembly import small_float_halves, whole_halves
from lowbit.kernels.gpu.language import INTERPRETED, cast


@triton.jit
def _plane(plane, rows, tile, columns, TILE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 (rows, TILE): the bytes of a plane that hold a tile, and its neighbours under other shifts."""
    PARTS: tl.constexpr = 8 // WIDTH
    stride = tl.cdiv(columns, TILE * PARTS) * TILE
    at = (tile // PARTS) * TILE + tl.arange(0, TILE)
    return tl.load(plane + (rows[:, None] * stride + at[None, :]))


@triton.jit
def load_run(  # type: ignore[no-untyped-def]
    plane4,
    plane2,
    plane1,
    codes,
    rows,
    run,
    columns,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Three uint8 (rows, TILE), low bits first, that hold a run's codes; unused ones equal the first."""
    first = run * FIELDS
    if BITS == 8:
        at = first * TILE + tl.arange(0, TILE)
        low = tl.load(codes + (rows[:, None] * columns + at[None, :]), mask=(at < columns)[None, :], other=0)
        middle = low
        high = low
    elif BITS >= 4:
        low = _plane(plane4, rows, first, columns, TILE, 4)
        middle = low
        high = low
        if BITS >= 6:
            middle = _plane(plane2, rows, first, columns, TILE, 2)
        if BITS == 5:
            middle = _plane(plane1, rows, first, columns, TILE, 1)
        if BITS == 7:
            high = _plane(plane1, rows, first, columns, TILE, 1)
    elif BITS >= 2:
        low = _plane(plane2, rows, first, columns, TILE, 2)
        middle = low
        high = low
        if BITS == 3:
            middle = _plane(plane1, rows, first, columns, TILE, 1)
    else:
        low = _plane(plane1, rows, first, columns, TILE, 1)
        middle = low
        high = low
    return low, middle, high


@triton.jit
def _bits(held, run, FIELD: tl.constexpr, FIELDS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's WIDTH bits from the bytes of its plane, by a constant shift in the widest plane."""
    PARTS: tl.constexpr = 8 // WIDTH
    place = FIELD if PARTS == FIELDS else (run * FIELDS + FIELD) % PARTS
    return (held >> (place * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def run_codes(  # type: ignore[no-untyped-def]
    low, middle, high, run, FIELD: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, KIND: tl.constexpr
):
    """int32 (rows, TILE): the canonical codes of one tile of a run."""
    held = low.to(tl.int32)
    if BITS == 8:
        codes = held
        if KIND == "whole":
            codes = held ^ 128
    elif BITS >= 4:
        codes = _bits(held, run, FIELD, FIELDS, 4)
        if BITS >= 6:
            codes = codes | (_bits(middle.to(tl.int32), run, FIELD, FIELDS, 2) << 4)
        if BITS == 5:
            codes = codes | (_bits(middle.to(tl.int32), run, FIELD, FIELDS, 1) << 4)
        if BITS == 7:
            codes = codes | (_bits(high.to(tl.int32), run, FIELD, FIELDS, 1) << 6)
    elif BITS >= 2:
        codes = _bits(held, run, FIELD, FIELDS, 2)
        if BITS == 3:
            codes = codes | (_bits(middle.to(tl.int32), run, FIELD, FIELDS, 1) << 2)
    else:
        codes = _bits(held, run, FIELD, FIELDS, 1)
    return codes


@triton.jit
def small_float(byte, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: what 8 or 6 bits (int32) are worth, in arithmetic that every GPU has.

    Exponent and significand go where float32 has them; its other bias is a factor. Codes that are no number
    become NaN.
    """
    sign = (byte & 128) << 24
    if KIND == "e2m3":
        bits = ((byte & 32) << 26) | ((byte & 31) << 20)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == "e3m2":
        bits = ((byte & 32) << 26) | ((byte & 31) << 21)
        value = bits.to(tl.float32, bitcast=True) * 2.1267647932558654e37  # 2^124
    elif KIND == "e5m2":  # the upper half of a float16, infinities and NaNs included
        value = (sign | ((byte & 127) << 21)).to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112
        special = (sign | 0x7F800000 | ((byte & 3) << 21)).to(tl.float32, bitcast=True)
        value = tl.where((byte & 124) == 124, special, value)
    elif KIND == "e4m3":
        value = (sign | ((byte & 127) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        value = tl.where((byte & 127) == 127, float("nan"), value)
    elif KIND == "e4m3fnuz":
        value = (sign | ((byte & 127) << 20)).to(tl.float32, bitcast=True) * 6.64613997892458e35  # 2^119
        value = tl.where(byte == 128, float("nan"), value)
    else:
        tl.static_assert(KIND == "e5m2fnuz")
        value = (sign | ((byte & 127) << 21)).to(tl.float32, bitcast=True) * 2.596148429267414e33  # 2^111
        value = tl.where(byte == 128, float("nan"), value)
    return value


@triton.jit
def run_values(  # type: ignore[no-untyped-def]
    low,
    middle,
    high,
    table,
    zero,
    run,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ZERO: tl.constexpr,
):
    """float32 (rows, TILE): value(code) of one tile of a run, minus ``zero`` (rows,) unless ZERO is "none".

    "exact" zero points leave whole numbers that bfloat16 holds.
    """
    if KIND == "e2m1":  # the sign stays, and what lies below goes to where float32 has it
        lifted = (low.to(tl.int32) << (28 - FIELD * 4)) >> 6
        values = (lifted & -0x7E400000).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == "whole":
        codes = run_codes(low, middle, high, run, FIELD, BITS, FIELDS, KIND)
        shifted = (codes | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23 + code
        if ZERO == "exact":
            values = shifted - (zero + (8388608.0 + BASE))[:, None]
        else:
            values = shifted - (8388608.0 + BASE)
    elif KIND == "table":
        codes = run_codes(low, middle, high, run, FIELD, BITS, FIELDS, KIND)
        entries = tl.load(table + tl.arange(0, 1 << BITS))
        flat = tl.reshape(codes, (codes.shape[0] * codes.shape[1],))
        values = tl.reshape(tl.gather(entries, flat, 0), codes.shape)
    else:
        values = small_float(run_codes(low, middle, high, run, FIELD, BITS, FIELDS, KIND), KIND)
    if ZERO != "none" and not (KIND == "whole" and ZERO == "exact"):
        values = values - zero[:, None]
    return values


@triton.jit
def run_operands(  # type: ignore[no-untyped-def]
    low,
    middle,
    high,
    table,
    zero,
    run,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ZERO: tl.constexpr,
    TYPE: tl.constexpr,
):
    """``run_values`` rounded to TYPE, which is exact but for tables.

    Whole numbers of up to 6 bits, and of 8, become 16-bit floats two at a time (``assembly``): a code is the
    end of the significand of 128 or 1,024, and what they have in common is subtracted. (What is subtracted
    from 7 bits may be more than 256, of which bfloat16 holds even numbers only.)
    """
    WHOLE: tl.constexpr = KIND == "whole" and BITS != 7
    SMALL: tl.constexpr = (KIND == "e2m1" or KIND == "e4m3") and ZERO == "none"
    if INTERPRETED or tl.float32 == TYPE or not (WHOLE or SMALL):
        values = run_values(low, middle, high, table, zero, run, FIELD, BITS, FIELDS, KIND, BASE, ZERO)
        operands = cast(values, TYPE)
    elif SMALL:
        operands = small_float_halves(low, KIND, FIELD, TYPE)
    else:
        WIDTH: tl.constexpr = 8 // FIELDS
        MORE: tl.constexpr = BITS - WIDTH
        place = run * FIELDS % (8 // (MORE if MORE else 8)) + FIELD
        raised = whole_halves(low, middle, place * MORE, FIELD * WIDTH, WIDTH, MORE, TYPE)
        if tl.bfloat16 != TYPE:
            least = zero * 0.0 + (1024.0 + BASE)
        elif BITS == 8:
            least = zero * 0.0 + (BASE - 128.0)
        else:
            least = zero * 0.0 + (BASE + 128.0)
        if ZERO == "exact":
            least += zero
        operands = raised - least.to(TYPE)[:, None]
    return operands


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    rows, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr
):
    """int64 (rows,): the number of the block that holds (row, column)."""
    if FLAT:
        block = (rows * columns + column) // COLUMNS
    else:
        block = rows * 0
        if ROWS == 1:
            block = rows
        elif ROWS > 1:
            block = rows // ROWS
        if COLUMNS > 0:
            block = block * tl.cdiv(columns, COLUMNS) + column // COLUMNS
    return block


@triton.jit
def _number(pointers, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: scales in any of the types they are stored in."""
    stored = tl.load(pointers)
    if KIND == "plain":
        number = stored.to(tl.float32)
    elif KIND == "e8m0":
        byte = stored.to(tl.int32)
        power = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
        number = tl.where(byte == 255, float("nan"), power)
    else:
        number = small_float(stored.to(tl.int32), KIND)
    return number


@triton.jit
def scale_of(  # type: ignore[no-untyped-def]
    scale0,
    scale1,
    rows,
    column,
    columns,
    FLAT: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS0: tl.constexpr,
    COLUMNS0: tl.constexpr,
    SCALE0: tl.constexpr,
    ROWS1: tl.constexpr,
    COLUMNS1: tl.constexpr,
    SCALE1: tl.constexpr,
):
    """float32 (rows,): the product of all levels' scales at a column, which must lie inside a row.

    Offsets have the same levels and are read with the same function.
    """
    scale = _number(scale0 + _block(rows, column, columns, ROWS0, COLUMNS0, FLAT), SCALE0)
    if LEVELS == 2:
        scale *= _number(scale1 + _block(rows, column, columns, ROWS1, COLUMNS1, FLAT), SCALE1)
    return scale


@triton.jit
def zero_of(  # type: ignore[no-untyped-def]
    zeros,
    rows,
    column,
    columns,
    ZERO: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS0: tl.constexpr,
    COLUMNS0: tl.constexpr,
):
    """float32 (rows,): the zero point at a column; 0 where the scheme has none."""
    if ZERO == "none":
        zero = (rows * 0).to(tl.float32)
    else:
        zero = tl.load(zeros + _block(rows, column, columns, ROWS0, COLUMNS0, FLAT)).to(tl.float32)
    return zero


@triton.jit
def weight_tile(  # type: ignore[no-untyped-def]
    low,
    middle,
    high,
    table,
    zeros,
    scale0,
    scale1,
    offset0,
    offset1,
    rows,
    run,
    columns,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    FLAT: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS0: tl.constexpr,
    COLUMNS0: tl.constexpr,
    SCALE0: tl.constexpr,
    ROWS1: tl.constexpr,
    COLUMNS1: tl.constexpr,
    SCALE1: tl.constexpr,
):
    """float32 (rows, TILE): the dequantized weights of one tile of a run."""
    column = tl.minimum((run * FIELDS + FIELD) * TILE, columns - 1)  # a run's last tiles may lie outside
    zero = zero_of(zeros, rows, column, columns, ZERO, FLAT, ROWS0, COLUMNS0)
    values = run_values(low, middle, high, table, zero, run, FIELD, BITS, FIELDS, KIND, BASE, ZERO)
    scale = scale_of(
        scale0, scale1, rows, column, columns, FLAT, LEVELS, ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1
    )
    weights = values * scale[:, None]
    if OFFSET:
        offset = scale_of(
            offset0,
            offset1,
            rows,
            column,
            columns,
            FLAT,
            LEVELS,
            ROWS0,
            COLUMNS0,
            SCALE0,
            ROWS1,
            COLUMNS1,
            SCALE1,
        )
        weights += offset[:, None]
    return weights
