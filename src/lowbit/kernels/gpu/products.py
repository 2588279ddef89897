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


@triton.jit(do_not_specialize=["runs_each"])
def word_product(  # type: ignore[no-untyped-def]
    x,
    out,
    parts,
    arrived,
    words,
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
    """``vector_product`` of whole numbers in one plane, which is read as ``words`` of four bytes.

    A code is masked where it stands in its word, and the word's bits are taken for a float32: below 2^24
    these are as many times 2^-149, exactly, subnormal or not. So a weight costs a mask and a multiplication;
    what a place in the word is worth is in x, and scales, zero points and offsets meet the sums of a group.
    GPUs multiply subnormal numbers at full rate, and Triton does not ask for zeros instead. Room for units is
    taken from x and scales: |x| from 2^63 on and scales from 2^43 on are infinite, which no model's are.
    (Bytes made integers, integers made floats, and each met by its scale were 7.6 instructions a weight.)

    ``TOGETHER``: all columns of a run lie in one group. ``WHOLE``: rows end with a run.
    """
    WIDE: tl.constexpr = TILE // 4
    MASK: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.arange(0, WIDE)
    stride = columns // 4 if BITS == 8 else tl.cdiv(columns, TILE * FIELDS) * WIDE
    first = tl.program_id(1) * runs_each
    last = tl.minimum(first + runs_each, runs)
    total = tl.zeros((BN, WIDE), tl.float32)
    part = tl.zeros((BN, WIDE), tl.float32)
    seen = tl.zeros((WIDE,), tl.float32)
    for run in tl.range(first, last, num_stages=STAGES):
        at = words + (inside[:, None] * stride + (run * WIDE + word)[None, :])
        if BITS < 8 or WHOLE:
            held = tl.load(at)
        else:
            held = tl.load(at, mask=((run * WIDE + word) * 4 < columns)[None, :], other=0)
        if BITS == 8:
            held = held ^ -2139062144  # 128 in each byte
        for field in tl.static_range(FIELDS):
            if field == 0 or not TOGETHER:
                part = tl.zeros((BN, WIDE), tl.float32)
                seen = tl.zeros((WIDE,), tl.float32)
            for byte in tl.static_range(4):
                shift = (byte if byte < 3 else 2) * 8 + field * BITS
                column = (run * FIELDS + field) * TILE + word * 4 + byte
                if WHOLE:
                    number = tl.load(x + column).to(tl.float32)
                else:
                    number = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
                bits = (held if byte < 3 else held >> 8) & (MASK << shift)
                raised = number * (18446744073709551616.0 / (1 << shift))  # 2^64
                part += bits.to(tl.float32, bitcast=True) * raised[None, :]
                seen += number
            if field == FIELDS - 1 or not TOGETHER:
                begins = (run * FIELDS + (0 if TOGETHER else field)) * TILE
                begins = tl.minimum(begins, columns - 1)  # a run's last tiles may lie outside
                scale = scale_of(
                    scale0, scale1, inside, begins, columns, FLAT, LEVELS,
                    ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                )  # fmt: skip
                total += part * (scale * 3.8685626227668134e25)[:, None]  # 2^(149 - 64)
                if BASE != 0 or ZERO != "none" or OFFSET:
                    zero = zero_of(zeros, inside, begins, columns, ZERO, FLAT, ROWS0, COLUMNS0)
                    least = -(zero + BASE) * scale
                    if OFFSET:
                        least += scale_of(
                            offset0, offset1, inside, begins, columns, FLAT, LEVELS,
                            ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                        )  # fmt: skip
                    total += least[:, None] * seen[None, :]
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
