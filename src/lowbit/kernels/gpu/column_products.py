"""The Triton kernels of weights whose scale belongs to one column of several rows: x @ weight.T.

A program's rows are of one *group*, which shares its columns' scales: ``units`` lists rows group by group, -1
where a unit of ``UNIT`` is filled up, so that codes stay in the weight's order (``weight_layout``). x is
multiplied by the group's scales once a program, and codes are decoded as in ``products``; the columns' zero
points give the same sum for all rows of a group:

    sum over c of (q[r, c] - z[c]) s[c] x[c] = sum of q[r, c] X[c] - sum of z[c] X[c],  X[c] = s[c] x[c]
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.gpu.weight_tiles import load_run, run_values, scale_of, weight_tile, zero_of


@triton.jit(do_not_specialize=["runs_each"])
def column_vector(  # type: ignore[no-untyped-def]
    x,  # (columns,)
    out,  # (splits, rows)
    units,  # int32 (blocks of rows * BN,)
    groups,  # int32, of each UNIT rows of them
    column_scale,  # (groups, columns)
    column_zero,  # alike, or None
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
    INNER: tl.constexpr,  # whether codes have scales of their rows
    UNIT: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token, on CUDA cores in float32. Grid: (blocks of rows, splits)."""
    row = tl.load(units + tl.program_id(0) * BN + tl.arange(0, BN))
    inside = tl.maximum(row, 0).to(tl.int64)
    group = tl.load(groups + tl.program_id(0) * BN // UNIT).to(tl.int64)
    first = tl.program_id(1) * runs_each
    total = tl.zeros((BN, TILE), tl.float32)
    taken = tl.zeros((TILE,), tl.float32)
    for run in tl.range(first, tl.minimum(first + runs_each, runs), num_stages=STAGES):
        low, middle, high = load_run(plane4, plane2, plane1, codes, inside, run, columns, BITS, TILE, FIELDS)
        for field in tl.static_range(FIELDS):
            at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
            seen = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
            seen *= tl.load(column_scale + group * columns + at, mask=at < columns, other=0.0).to(tl.float32)
            if column_zero is not None:
                zero = tl.load(column_zero + group * columns + at, mask=at < columns, other=0.0)
                taken += seen * zero.to(tl.float32)
            if INNER:
                weights = weight_tile(
                    low, middle, high, table, zeros, scale0, scale1, offset0, offset1, inside, run, columns,
                    field, BITS, TILE, FIELDS, KIND, BASE, ZERO, OFFSET, FLAT, LEVELS,
                    ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                )  # fmt: skip
            else:
                weights = run_values(
                    low, middle, high, table, None, run, field, BITS, FIELDS, KIND, BASE, "none"
                )
            total += weights * seen[None, :]
    sums = cast(tl.sum(total, 1) - tl.sum(taken, 0), out.dtype.element_ty)
    tl.store(out + (tl.program_id(1) * rows + row), sums, mask=row >= 0)


@triton.jit(do_not_specialize=["tokens", "runs_each"])
def column_tile(  # type: ignore[no-untyped-def]
    x,  # float16 (tokens, blocks * 128)
    worth,  # float32 (tokens, blocks)
    out,  # (splits, tokens, rows)
    units,
    groups,
    column_scale,
    column_zero,
    factors,  # float32 (groups,): powers of two that no scale of the group is above
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
    blocks,
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
    INNER: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM tokens times BN rows of a group, on tensor cores.

    Codes less whole zero points are float16's own, X is rounded to float16; scales and other zero points of
    the rows' groups meet float32 sums of a tile. Grid: (blocks of tokens * blocks of rows, splits).
    """
    token_blocks = tl.cdiv(tokens, BM)
    token = (tl.program_id(0) % token_blocks) * BM + tl.arange(0, BM)
    block = tl.program_id(0) // token_blocks
    there = token < tokens
    row = tl.load(units + block * BN + tl.arange(0, BN))
    inside = tl.maximum(row, 0).to(tl.int64)
    group = tl.load(groups + block * BN // UNIT).to(tl.int64)
    factor = tl.load(factors + group)
    inverse = 1.0 / factor
    first = tl.program_id(1) * runs_each
    x_rows = x + token.to(tl.int64)[:, None] * (blocks * 128)
    total = tl.zeros((BN, BM), tl.float32)
    taken = tl.zeros((BM, TILE), tl.float32)
    TAKEN: tl.constexpr = "exact" if ZERO == "exact" else "none"
    for run in range(first, tl.minimum(first + runs_each, runs)):
        low, middle, high = load_run(plane4, plane2, plane1, codes, inside, run, columns, BITS, TILE, FIELDS)
        scale_at = worth + token.to(tl.int64) * blocks + run * (FIELDS * TILE) // 128
        given = tl.load(scale_at, mask=there, other=0.0)
        part = tl.zeros((BN, BM), tl.float32)
        for field in tl.static_range(FIELDS):
            at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
            seen = tl.load(x_rows + at[None, :], mask=there[:, None], other=0.0).to(tl.float32)
            scale = tl.load(column_scale + group * columns + at, mask=at < columns, other=0.0)
            scaled = cast(seen * (scale.to(tl.float32) * inverse)[None, :], tl.float16)
            if column_zero is not None:
                zero = tl.load(column_zero + group * columns + at, mask=at < columns, other=0.0)
                taken += scaled.to(tl.float32) * zero.to(tl.float32)[None, :] * given[:, None]
            seen = tl.trans(scaled)
            if INNER:
                column = tl.minimum((run * FIELDS + field) * TILE, columns - 1)
                zero = zero_of(zeros, inside, column, columns, ZERO, FLAT, ROWS0, COLUMNS0)
                values = run_values(
                    low, middle, high, table, zero, run, field, BITS, FIELDS, KIND, BASE, TAKEN
                )
                scale = scale_of(
                    scale0, scale1, inside, column, columns, FLAT, LEVELS,
                    ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                )  # fmt: skip
                product = dot(cast(values, tl.float16), seen, tl.zeros((BN, BM), tl.float32))
                part += product * scale[:, None]
                if ZERO == "float":
                    ones = tl.full((BN, TILE), 1.0, tl.float32).to(tl.float16)
                    part -= dot(ones, seen, tl.zeros((BN, BM), tl.float32)) * (zero * scale)[:, None]
            else:
                values = run_values(
                    low, middle, high, table, None, run, field, BITS, FIELDS, KIND, BASE, "none"
                )
                part = dot(cast(values, tl.float16), seen, part)
        total += part * given[None, :]
    total = (total - tl.sum(taken, 1)[None, :]) * factor
    at = (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * out_stride + row[None, :]
    kept = there[:, None] & (row >= 0)[None, :]
    tl.store(out + at, cast(tl.trans(total), out.dtype.element_ty), mask=kept)
