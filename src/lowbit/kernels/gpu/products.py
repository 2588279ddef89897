"""The Triton kernels of linear layers with packed weights: x @ weight.T, and rows of a weight.

All decode tiles as ``weight_tiles`` says and differ in what they do with them; ``linear`` chooses. Output
rows are the weights': a product is total (weight rows, tokens) = weight tile @ x tile.T, so that a decoded
tile goes from registers to the tensor cores and x is read from shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.gpu.weight_tiles import load_run, run_operands, scale_of, weight_tile, zero_of


@triton.jit
def _is_last(arrived):  # type: ignore[no-untyped-def]
    """Whether the parts of all other splits of a tile are stored; asked by each program behind its own.

    ``arrived``: how many were; 0 again behind the last, for the next launch.
    """
    tl.debug_barrier()  # what all threads stored comes before the count
    splits = tl.num_programs(1)
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _store_sums(  # type: ignore[no-untyped-def]
    sums, out, parts, arrived, row, rows, SPLIT: tl.constexpr
):
    """One token's sums of some rows, of all columns or of a split's: then the last of these adds them up in
    their order, so that equal calls give equal bits."""
    present = row < rows
    if SPLIT:
        tl.store(parts + (tl.program_id(1) * rows + row), sums, mask=present)
        if _is_last(arrived + tl.program_id(0)):
            total = tl.zeros_like(sums)
            for split in range(tl.num_programs(1)):
                at = parts + (split * rows + row)
                total += tl.load(at, mask=present, other=0.0, cache_modifier=".cg")
            tl.store(out + row, cast(total, out.dtype.element_ty), mask=present)
    else:
        tl.store(out + row, cast(sums, out.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["runs_each"])
def vector_product(  # type: ignore[no-untyped-def]
    x,
    out,
    parts,
    arrived,
    plane4,
    plane2,
    plane1,
    codes,
    table,
    zeros,
    scale0,
    scale1,
    offset0,
    offset1,
    rows,
    columns,
    runs,
    runs_each,
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
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token: x (columns,) times BN rows of the weight over ``runs_each`` runs. out: (rows,).

    Products and sums are float32, on CUDA cores; the sum over a tile's columns is made once, at the end.
    SPLIT: ``parts`` is float32 (splits, rows), ``arrived`` a zero for each block of rows.
    Grid: (blocks of BN rows, splits).
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    first = tl.program_id(1) * runs_each
    last = tl.minimum(first + runs_each, runs)
    total = tl.zeros((BN, TILE), tl.float32)
    for run in tl.range(first, last, num_stages=STAGES):
        low, middle, high = load_run(plane4, plane2, plane1, codes, inside, run, columns, BITS, TILE, FIELDS)
        for field in tl.static_range(FIELDS):
            at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
            seen = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
            weights = weight_tile(
                low, middle, high, table, zeros, scale0, scale1, offset0, offset1, inside, run, columns,
                field, BITS, TILE, FIELDS, KIND, BASE, ZERO, OFFSET, FLAT, LEVELS,
                ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
            )  # fmt: skip
            total += weights * seen[None, :]
    _store_sums(tl.sum(total, 1), out, parts, arrived, row, rows, SPLIT)


@triton.jit
def _plane_words(  # type: ignore[no-untyped-def]
    plane, rows, run, columns, TILE: tl.constexpr, FIELDS: tl.constexpr, WIDTH: tl.constexpr
):
    """int32 (rows, TILE / 4): a run's codes in a plane, its first tile's in the low bits of each byte."""
    WIDE: tl.constexpr = TILE // 4
    PARTS: tl.constexpr = 8 // WIDTH
    at = run * FIELDS // PARTS * WIDE + tl.arange(0, WIDE)
    held = tl.load(plane + (rows[:, None] * (tl.cdiv(columns, TILE * PARTS) * WIDE) + at[None, :]))
    if PARTS != FIELDS:
        held = held >> (run * FIELDS % PARTS * WIDTH)
    return held


@triton.jit
def _moved(  # type: ignore[no-untyped-def]
    held, DOWN: tl.constexpr, UP: tl.constexpr, PLACE: tl.constexpr, WIDTH: tl.constexpr
):
    """WIDTH bits of a plane's words, at the place where they stand when these are moved."""
    if DOWN > UP:
        held = held >> (DOWN - UP)
    elif UP > DOWN:
        held = held << (UP - DOWN)
    return held & (((1 << WIDTH) - 1) << PLACE)


@triton.jit
def _masked(  # type: ignore[no-untyped-def]
    low, middle, high, PLACE: tl.constexpr, FIELD: tl.constexpr, DOWN: tl.constexpr, BITS: tl.constexpr
):
    """float32: a tile's whole numbers times 2^(PLACE - 149); other planes' bits are above the first's."""
    WIDTH: tl.constexpr = BITS if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    bits = _moved(low, DOWN, 0, PLACE, WIDTH)
    if BITS == 6 or BITS == 7:
        bits |= _moved(middle, DOWN, FIELD * 2 + 4, PLACE + 4, 2)
    elif BITS == 5:
        bits |= _moved(middle, DOWN, FIELD * 3 + 4, PLACE + 4, 1)
    elif BITS == 3:
        bits |= _moved(middle, DOWN, FIELD + 2, PLACE + 2, 1)
    if BITS == 7:
        bits |= _moved(high, DOWN, FIELD * 3 + 6, PLACE + 6, 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    low, middle, high, BYTE: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr
):
    """int32: a tile's codes in one byte of its words."""
    WIDTH: tl.constexpr = 4 if BITS >= 4 else (2 if BITS >= 2 else 1)
    code = (low >> (BYTE * 8 + FIELD * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 6 or BITS == 7:
        code |= ((middle >> (BYTE * 8 + FIELD * 2)) & 3) << 4
    elif BITS == 5:
        code |= ((middle >> (BYTE * 8 + FIELD)) & 1) << 4
    elif BITS == 3:
        code |= ((middle >> (BYTE * 8 + FIELD)) & 1) << 2
    if BITS == 7:
        code |= ((high >> (BYTE * 8 + FIELD)) & 1) << 6
    return code


@triton.jit
def _lifted(held, PLACE: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: floats of a few bits that stand at a place, sign, exponent and significand where float32 has
    them, which is 2^-126 (e2m1) or 2^-120 (e4m3) times their worth."""
    if KIND == "e2m1":  # copies of the sign lie between it and the rest
        bits = ((held << (28 - PLACE)) >> 6) & -0x7E400000
    else:
        tl.static_assert(KIND == "e4m3")
        bits = ((held << (24 - PLACE)) >> 4) & -0x78100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["runs_each"])
def word_product(  # type: ignore[no-untyped-def]
    x,
    out,
    parts,
    arrived,
    plane4,
    plane2,
    plane1,
    codes,
    table,
    zeros,
    scale0,
    scale1,
    offset0,
    offset1,
    rows,
    columns,
    runs,
    runs_each,
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
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``vector_product`` of whole numbers, e2m1, e4m3 and tables, whose bytes are read as words of four.

    A whole number is masked where it stands in its word, its bits of other planes beside them, and these are
    taken for a float32: below 2^24 they are as many times 2^-149, exactly, subnormal or not. So a weight
    costs a mask a plane and a multiplication; what a place in the word is worth is in x, and scales, zero
    points and offsets meet the sums of a group. GPUs multiply subnormal numbers at full rate, and Triton
    does not ask for zeros instead. Room for units is taken from x and scales: |x| from 2^63 on and whole
    numbers' scales from 2^43 on are infinite, which no model's are. (Bytes made integers, integers made
    floats, and each met by its scale were 7.6 instructions a weight, and twice as many where bits came from
    two planes.) Small floats are ``_lifted``; of a table values are looked up in shared memory.

    ``TOGETHER``: all columns of a run lie in one group. ``WHOLE``: rows end with a run.
    """
    WIDE: tl.constexpr = TILE // 4
    WIDTH: tl.constexpr = 8 // FIELDS
    RAISE: tl.constexpr = 18446744073709551616.0  # 2^64
    UNIT: tl.constexpr = 2.0**85 if KIND == "whole" else (2.0**62 if KIND == "e2m1" else 2.0**56)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.arange(0, WIDE)
    first = tl.program_id(1) * runs_each
    last = tl.minimum(first + runs_each, runs)
    total = tl.zeros((BN, WIDE), tl.float32)
    part = tl.zeros((BN, WIDE), tl.float32)
    seen = tl.zeros((WIDE,), tl.float32)
    special = tl.zeros((BN, WIDE), tl.int32)
    for run in tl.range(first, last, num_stages=STAGES):
        if BITS == 8:
            at = run * WIDE + word
            if WHOLE:
                low = tl.load(codes + (inside[:, None] * (columns // 4) + at[None, :]))
            else:
                mask = (at * 4 < columns)[None, :]
                low = tl.load(codes + (inside[:, None] * (columns // 4) + at[None, :]), mask=mask, other=0)
            if KIND == "whole":
                low = low ^ -2139062144  # 128 in each byte
            else:  # the upper bit of a byte becomes 1 where the rest of it is 127, which is no number
                special |= (low & 0x7F7F7F7F) + 0x01010101
        elif BITS >= 4:
            low = _plane_words(plane4, inside, run, columns, TILE, FIELDS, 4)
        elif BITS >= 2:
            low = _plane_words(plane2, inside, run, columns, TILE, FIELDS, 2)
        else:
            low = _plane_words(plane1, inside, run, columns, TILE, FIELDS, 1)
        middle = low
        high = low
        if BITS == 6 or BITS == 7:
            middle = _plane_words(plane2, inside, run, columns, TILE, FIELDS, 2)
        elif BITS == 3 or BITS == 5:
            middle = _plane_words(plane1, inside, run, columns, TILE, FIELDS, 1)
        if BITS == 7:
            high = _plane_words(plane1, inside, run, columns, TILE, FIELDS, 1)
        for field in tl.static_range(FIELDS):
            if field == 0 or not TOGETHER:
                part = tl.zeros((BN, WIDE), tl.float32)
                seen = tl.zeros((WIDE,), tl.float32)
            for byte in tl.static_range(4):
                column = (run * FIELDS + field) * TILE + word * 4 + byte
                if WHOLE:
                    number = tl.load(x + column).to(tl.float32)
                else:
                    number = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
                if KIND == "whole":
                    # What is masked has 24 bits at most: one byte is moved, or two where codes grow upwards.
                    down = (0, 0, 0, 8)[byte] if BITS * FIELDS == 8 else byte // 2 * 16
                    place = byte * 8 - down + field * WIDTH
                    values = _masked(low, middle, high, place, field, down, BITS)
                    part += values * (number * (RAISE / (1 << place)))[None, :]
                elif KIND == "table":
                    flat = tl.reshape(_codes(low, middle, high, byte, field, BITS), (BN * WIDE,))
                    values = tl.gather(tl.load(table + tl.arange(0, 1 << BITS)), flat, 0)
                    part += tl.reshape(values, (BN, WIDE)) * number[None, :]
                else:
                    part += _lifted(low, byte * 8 + field * WIDTH, KIND) * (number * RAISE)[None, :]
                seen += number
            if field == FIELDS - 1 or not TOGETHER:
                begins = (run * FIELDS + (0 if TOGETHER else field)) * TILE
                begins = tl.minimum(begins, columns - 1)  # a run's last tiles may lie outside
                scale = scale_of(
                    scale0, scale1, inside, begins, columns, FLAT, LEVELS,
                    ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                )  # fmt: skip
                if KIND == "whole":
                    total += part * (scale * UNIT)[:, None]
                elif KIND == "table":
                    total += part * scale[:, None]
                else:  # e8m0's scales need all of float32's exponents
                    total += (part * UNIT) * scale[:, None]
                if BASE != 0 or ZERO != "none" or OFFSET:
                    zero = zero_of(zeros, inside, begins, columns, ZERO, FLAT, ROWS0, COLUMNS0)
                    least = -(zero + BASE) * scale
                    if OFFSET:
                        least += scale_of(
                            offset0, offset1, inside, begins, columns, FLAT, LEVELS,
                            ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                        )  # fmt: skip
                    total += least[:, None] * seen[None, :]
    if KIND == "e4m3":
        total = tl.where((special & -2139062144) != 0, float("nan"), total)
    _store_sums(tl.sum(total, 1), out, parts, arrived, row, rows, SPLIT)


@triton.jit(do_not_specialize=["tokens", "runs_each"])
def tile_product(  # type: ignore[no-untyped-def]
    x,
    out,
    parts,
    arrived,
    plane4,
    plane2,
    plane1,
    codes,
    table,
    zeros,
    scale0,
    scale1,
    offset0,
    offset1,
    tokens,
    rows,
    columns,
    x_stride,
    out_stride,
    runs,
    runs_each,
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
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """BM tokens times BN rows over ``runs_each`` runs, on tensor cores. out: (tokens, rows).

    EXACT: values less zero points are multiplied, which x's type holds, and scales meet each tile's float32
    sums; offsets meet the sums of x, which a product with ones gives every row of the accumulator. Else
    tiles are dequantized and rounded to x's type. SPLIT: ``parts`` is float32 (splits, tokens, rows),
    ``arrived`` a zero for each tile of the output.

    Grid: (blocks of tokens * blocks of rows, splits): programs that share weights follow each other, so that
    they are read from memory once, and x (some hundred rows at most) stays in the L2 cache.
    """
    token_blocks = tl.cdiv(tokens, BM)
    token = (tl.program_id(0) % token_blocks) * BM + tl.arange(0, BM)
    row = (tl.program_id(0) // token_blocks) * BN + tl.arange(0, BN)
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    first = tl.program_id(1) * runs_each
    last = tl.minimum(first + runs_each, runs)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BN, BM), tl.float32)
    SUMS: tl.constexpr = OFFSET or ZERO == "float"
    TAKEN: tl.constexpr = "exact" if ZERO == "exact" else "none"  # other zero points meet the sums of x
    for run in range(first, last):
        low, middle, high = load_run(plane4, plane2, plane1, codes, inside, run, columns, BITS, TILE, FIELDS)
        for field in tl.static_range(FIELDS):
            at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
            seen = tl.load(
                x_rows + at[None, :], mask=(token < tokens)[:, None] & (at < columns)[None, :], other=0.0
            )
            seen = tl.trans(seen)
            if EXACT:
                column = tl.minimum((run * FIELDS + field) * TILE, columns - 1)
                zero = zero_of(zeros, inside, column, columns, ZERO, FLAT, ROWS0, COLUMNS0)
                values = run_operands(
                    low, middle, high, table, zero, run, field, BITS, FIELDS, KIND, BASE, TAKEN,
                    x.dtype.element_ty,
                )  # fmt: skip
                scale = scale_of(
                    scale0, scale1, inside, column, columns, FLAT, LEVELS,
                    ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                )  # fmt: skip
                part = dot(values, seen, tl.zeros((BN, BM), tl.float32))
                total += part * scale[:, None]
                if SUMS:
                    addend = scale * 0.0
                    if OFFSET:
                        addend = scale_of(
                            offset0, offset1, inside, column, columns, FLAT, LEVELS,
                            ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                        )  # fmt: skip
                    if ZERO == "float":
                        addend -= zero * scale
                    ones = tl.full((BN, TILE), 1.0, tl.float32).to(x.dtype.element_ty)
                    total += dot(ones, seen, tl.zeros((BN, BM), tl.float32)) * addend[:, None]
            else:
                weights = weight_tile(
                    low, middle, high, table, zeros, scale0, scale1, offset0, offset1, inside, run, columns,
                    field, BITS, TILE, FIELDS, KIND, BASE, ZERO, OFFSET, FLAT, LEVELS,
                    ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                )  # fmt: skip
                total = dot(cast(weights, x.dtype.element_ty), seen, total)
    at = token.to(tl.int64)[:, None] * out_stride + row[None, :]
    kept = (token < tokens)[:, None] & (row < rows)[None, :]
    sums = tl.trans(total)
    if SPLIT:
        apart = token.to(tl.int64)[:, None] * rows + row[None, :]
        whole = tokens.to(tl.int64) * rows
        tl.store(parts + (apart + tl.program_id(1) * whole), sums, mask=kept)
        if _is_last(arrived + tl.program_id(0)):
            sums = tl.zeros_like(sums)
            for split in range(tl.num_programs(1)):
                sums += tl.load(parts + (apart + split * whole), mask=kept, other=0.0, cache_modifier=".cg")
            tl.store(out + at, cast(sums, out.dtype.element_ty), mask=kept)
    else:
        tl.store(out + at, cast(sums, out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens", "splits"])
def add_splits(  # type: ignore[no-untyped-def]
    parts, out, tokens, rows, out_stride, splits, BLOCK: tl.constexpr
):
    """parts: float32 (splits, tokens, rows), added in their order. Grid: (tokens, blocks of rows)."""
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + ((split * tokens + token) * rows + row), mask=row < rows, other=0.0)
    tl.store(out + (token * out_stride + row), cast(total, out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["start", "count"])
def dequantize(  # type: ignore[no-untyped-def]
    out,
    ids,
    order,
    plane4,
    plane2,
    plane1,
    codes,
    table,
    zeros,
    scale0,
    scale1,
    offset0,
    offset1,
    start,
    count,
    rows,
    columns,
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
    BN: tl.constexpr,
):
    """``count`` rows of the weight into out (count, columns): from ``start`` on, or those that ``ids`` names.

    With ``order`` columns go where x has them, else they stay in stored order. Ids outside are the nearest
    row's. Grid: (blocks of BN rows, runs).
    """
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    row = start + place
    if ids is not None:
        row = tl.load(ids + place, mask=place < count, other=0)
    row = tl.maximum(tl.minimum(row.to(tl.int64), rows - 1), 0)
    run = tl.program_id(1)
    low, middle, high = load_run(plane4, plane2, plane1, codes, row, run, columns, BITS, TILE, FIELDS)
    out_rows = out + place.to(tl.int64)[:, None] * columns
    for field in tl.static_range(FIELDS):
        weights = weight_tile(
            low, middle, high, table, zeros, scale0, scale1, offset0, offset1, row, run, columns, field,
            BITS, TILE, FIELDS, KIND, BASE, ZERO, OFFSET, FLAT, LEVELS,
            ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
        )  # fmt: skip
        at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
        to = at
        if order is not None:
            to = tl.load(order + at, mask=at < columns, other=0)
        kept = (place < count)[:, None] & (at < columns)[None, :]
        tl.store(out_rows + to[None, :], cast(weights, out.dtype.element_ty), mask=kept)
