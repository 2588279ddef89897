"""The Triton kernels of weights that float16 arithmetic makes of codes (SpQR), and of outliers beside them.

One decoder, ``_weights``, gives a tile of 16 columns as the float16 numbers it stands for: with each result
rounded to float16, (code - zero) * scale. A float32 difference or product of two such numbers has enough
bits for that rounding to be the only one that counts. Codes lie in planes of 2 bits and 1, runs of 64 columns
(``weight_layout``). Outliers lie row by row and are multiplied by themselves: few are in any tile, and a
program cannot put a number into one place of a tile that it has in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.gpu.weight_tiles import load_run, run_values

TILE = tl.constexpr(16)  # columns of a tile: those that share a scale and a zero point
FIELDS = tl.constexpr(4)  # tiles of a run


@triton.jit
def _weights(low, middle, zeros, scales, rows, run, columns, FIELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """float16 (rows, 16): one tile of a run; behind the last column 0."""
    tile = run * FIELDS + FIELD
    tiles = tl.cdiv(columns, TILE)
    at = rows * tiles + tl.minimum(tile, tiles - 1)
    zero = tl.load(zeros + at).to(tl.float32)
    scale = tl.load(scales + at).to(tl.float32)
    scale = tl.where(tile < tiles, scale, 0.0)  # else what is no code may be infinite beside it
    values = run_values(low, middle, middle, None, zero, run, FIELD, 3, FIELDS, "whole", 0, "float")
    return cast(cast(values, tl.float16).to(tl.float32) * scale[:, None], tl.float16)


@triton.jit(do_not_specialize=["each"])
def half_vector(  # type: ignore[no-untyped-def]
    x,  # float16 (blocks * 128,)
    worth,  # float32 (blocks,)
    out,  # (splits, rows)
    plane2,
    plane1,
    zeros,
    scales,
    rows,
    columns,
    runs,
    each,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token times BN rows over ``each`` runs, on CUDA cores. Grid: (blocks of rows, splits)."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    first = tl.program_id(1) * each
    total = tl.zeros((BN, TILE), tl.float32)
    for run in tl.range(first, tl.minimum(first + each, runs), num_stages=STAGES):
        low, middle, _ = load_run(None, plane2, plane1, None, inside, run, columns, 3, TILE, FIELDS)
        scale = tl.load(worth + run // 2)
        for field in tl.static_range(FIELDS):
            seen = tl.load(x + (run * FIELDS + field) * TILE + tl.arange(0, TILE)).to(tl.float32) * scale
            weights = _weights(low, middle, zeros, scales, inside, run, columns, field)
            total += weights.to(tl.float32) * seen[None, :]
    sums = cast(tl.sum(total, 1), out.dtype.element_ty)
    tl.store(out + tl.program_id(1) * rows + row, sums, mask=row < rows)


@triton.jit(do_not_specialize=["tokens", "token_blocks", "each"])
def half_tile(  # type: ignore[no-untyped-def]
    x,  # float16 (tokens / SAME, blocks * 128)
    worth,  # float32 (tokens / SAME, blocks)
    out,  # (splits, tokens, rows)
    plane2,
    plane1,
    zeros,
    scales,
    token_rows,  # int32 (token_blocks * BM,): ``expert_rows``, or None
    experts,  # int32 (token_blocks,), or None: then there are codes and scales of every expert
    tokens,
    token_blocks,
    rows,
    columns,
    blocks,
    out_row,
    runs,
    each,
    size2,  # bytes of an expert's planes, and numbers of its scales
    size1,
    size0,
    SAME: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM tokens times BN rows over ``each`` runs, on tensor cores.

    Grid: (token_blocks * blocks of rows, splits): programs that share weights follow each other. With experts
    a token is a pair of token and expert, ``SAME`` of which have a row of x, and those of a block have one
    expert, or none.
    """
    token_block = tl.program_id(0) % token_blocks
    token = token_block * BM + tl.arange(0, BM)
    row = (tl.program_id(0) // token_blocks) * BN + tl.arange(0, BN)
    if experts is not None:
        expert = tl.load(experts + token_block).to(tl.int64)
        if expert < 0:
            return
        plane2 += expert * size2
        plane1 += expert * size1
        zeros += expert * size0
        scales += expert * size0
        token = tl.load(token_rows + token)
    there = token < tokens
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    first = tl.program_id(1) * each
    seen_row = (token // SAME).to(tl.int64)
    x_rows = x + seen_row[:, None] * (blocks * 128)
    total = tl.zeros((BN, BM), tl.float32)
    for run in range(first, tl.minimum(first + each, runs)):
        low, middle, _ = load_run(None, plane2, plane1, None, inside, run, columns, 3, TILE, FIELDS)
        part = tl.zeros((BN, BM), tl.float32)
        for field in tl.static_range(FIELDS):
            at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
            seen = tl.load(x_rows + at[None, :], mask=there[:, None], other=0.0)
            part = dot(
                _weights(low, middle, zeros, scales, inside, run, columns, field), tl.trans(seen), part
            )
        scale = tl.load(worth + seen_row * blocks + run // 2, mask=there, other=0.0)
        total += part * scale[None, :]
    place = (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * out_row + row[None, :]
    kept = there[:, None] & (row < rows)[None, :]
    tl.store(out + place, cast(tl.trans(total), out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["count"])
def half_rows(  # type: ignore[no-untyped-def]
    out,  # float32 (count, columns)
    ids,
    order,  # int64 (columns,): where each goes, or None
    plane2,
    plane1,
    zeros,
    scales,
    count,
    rows,
    columns,
    BN: tl.constexpr,
):
    """Rows that ``ids`` names, without outliers; ids outside are the nearest row's.

    Grid: (blocks of BN rows, runs).
    """
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.load(ids + place, mask=place < count, other=0).to(tl.int64)
    row = tl.maximum(tl.minimum(row, rows - 1), 0)
    run = tl.program_id(1)
    low, middle, _ = load_run(None, plane2, plane1, None, row, run, columns, 3, TILE, FIELDS)
    for field in tl.static_range(FIELDS):
        at = (run * FIELDS + field) * TILE + tl.arange(0, TILE)
        to = at
        if order is not None:
            to = tl.load(order + at, mask=at < columns, other=0)
        weights = _weights(low, middle, zeros, scales, row, run, columns, field).to(tl.float32)
        kept = (place < count)[:, None] & (at < columns)[None, :]
        tl.store(out + place.to(tl.int64)[:, None] * columns + to[None, :], weights, mask=kept)


@triton.jit
def _outlier(entry):  # type: ignore[no-untyped-def]
    """An entry's stored column, and its number as float32."""
    number = (entry >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return entry & 0xFFFF, number


@triton.jit(do_not_specialize=["tokens", "seen_tokens"])
def outlier_sums(  # type: ignore[no-untyped-def]
    x,  # (inputs, seen_tokens)
    out,  # float32 (tokens, rows)
    order,  # int64 (columns,): the input of each, or None
    starts,  # int32 (rows + 1,)
    entries,  # int32 (outliers,)
    rests,  # float16 (outliers,): what rounding the sum with the weight adds
    first_entries,  # int64 (experts,): where each's begin, order and starts are (experts, ...); or None
    token_rows,  # int32: ``expert_rows``; None: tokens lie in order
    experts,  # of every BM tokens in this order
    tokens,
    seen_tokens,
    rows,
    columns,
    count,  # of experts
    SAME: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
):
    """Outliers times x, K of each of R rows at a time and M tokens. Grid: (blocks of rows, of tokens).

    With experts a token is a pair of token and expert, ``SAME`` of which have a column of x.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.program_id(1) * M + tl.arange(0, M)
    if first_entries is not None:
        expert = tl.load(experts + tl.program_id(1) * M // BM).to(tl.int64)
        if (expert < 0) | (expert >= count):
            return
        own = tl.load(first_entries + expert)
        entries += own
        rests += own
        starts += expert * (rows + 1)
        if order is not None:
            order += expert * columns
        if token_rows is not None:
            token = tl.load(token_rows + token)
    inside, there = row < rows, token < tokens
    first = tl.load(starts + row, mask=inside, other=0)
    last = tl.load(starts + row + 1, mask=inside, other=0)
    total = tl.zeros((R, M), tl.float32)
    for step in range(0, tl.max(last - first, 0), K):
        at = (first + step)[:, None] + tl.arange(0, K)[None, :]
        held = at < last[:, None]
        column, number = _outlier(tl.load(entries + at, mask=held, other=0))
        number += tl.load(rests + at, mask=held, other=0.0).to(tl.float32)
        column = column.to(tl.int64)
        if order is not None:
            column = tl.load(order + column, mask=held, other=0)
        place = column[:, :, None] * seen_tokens + (token // SAME)[None, None, :]
        seen = tl.load(x + place, mask=held[:, :, None] & there[None, None, :], other=0.0).to(tl.float32)
        total += tl.sum(number[:, :, None] * seen, 1)
    place = token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out + place, total, mask=inside[:, None] & there[None, :])


@triton.jit
def outlier_rows(  # type: ignore[no-untyped-def]
    out,  # float32 (count, columns)
    ids,
    order,
    starts,
    entries,
    rows,
    columns,
    K: tl.constexpr,
):
    """Adds the outliers of a row that ``half_rows`` made, and rounds the sums to float16. Grid: (count,)."""
    row = tl.load(ids + tl.program_id(0)).to(tl.int64)
    row = tl.maximum(tl.minimum(row, rows - 1), 0)
    to = out + tl.program_id(0).to(tl.int64) * columns
    last = tl.load(starts + row + 1)
    for first in range(tl.load(starts + row), last, K):
        at = first + tl.arange(0, K)
        held = at < last
        column, number = _outlier(tl.load(entries + at, mask=held, other=0))
        if order is not None:
            column = tl.load(order + column, mask=held, other=0)
        sums = tl.load(to + column, mask=held, other=0.0) + number
        tl.store(to + column, cast(sums, tl.float16).to(tl.float32), mask=held)
