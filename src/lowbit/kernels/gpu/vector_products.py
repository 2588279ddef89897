"""The Triton kernels of codebooks: float16 x (``half_inputs``) @ weight.T, weights being numbers of vectors.

Vectors are gathered whole, up to 16 bytes a thread and load, from codebooks in global memory that the L1 or
the L2 cache holds. One decoder gives (H, V, L) float32 numbers of a step of 64 stored columns, by an index
for each of H and V. Where vectors run along rows (AQLM), H are rows and V * L columns, in their order; ROWS
rows share an index, whose vector has L numbers for each. Where they run down columns (VPTQ, TALL), H * L are
rows and V columns. L is a power of two, of which a vector has the first ``LENGTH``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast, dot

STEP = 64  # columns


@triton.jit
def _vectors(  # type: ignore[no-untyped-def]
    indices, codebooks, first, at, inside, rows, L: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr
):
    """float32 (H, V, L): the vectors that indices (H, V) at ``at`` name, of those from ``first`` on."""
    index = tl.load(indices + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    index = tl.minimum(index, MOST)  # a damaged file reads a wrong vector, not other memory
    vector = first + index
    if ROWS > 1:
        vector = vector * ROWS + (rows % ROWS).to(tl.int32)[:, None]
    place = vector[:, :, None] * L + tl.arange(0, L)[None, None, :]
    return tl.load(codebooks + place).to(tl.float32)


@triton.jit
def numbers(  # type: ignore[no-untyped-def]
    indices,  # uint8 or int16 (BOOKS, rows / ROWS, width); TALL: (height, width)
    second,  # those of the residual codebook, where there is one (rows / ROWS or height, width)
    codebooks,  # (BOOKS, MOST + 1, ROWS * L), then (SECOND, ROWS * L); TALL: (books, MOST + 1 + SECOND, L)
    rows,  # int64 (H,), inside the weight
    step,
    height,
    width,
    book_steps,  # TALL: steps of a book
    BOOKS: tl.constexpr,
    MOST: tl.constexpr,  # the last index
    SECOND: tl.constexpr,  # vectors of the residual codebook, 0 for none
    L: tl.constexpr,
    ROWS: tl.constexpr,
    TALL: tl.constexpr,
):
    """float32 (H, V, L): the weights of a step, less the rows' scale."""
    V: tl.constexpr = 64 if TALL else 64 // L
    column = step * V + tl.arange(0, V)[None, :]
    inside = column < width
    held = rows if ROWS == 1 else rows // ROWS
    at = held[:, None] * width + column
    first = 0
    if TALL:
        first = (step // book_steps) * (MOST + 1 + SECOND)
    total = _vectors(indices, codebooks, first, at, inside, rows, L, ROWS, MOST)
    if SECOND > 0:
        behind: tl.constexpr = (MOST + 1) * (1 if TALL else BOOKS)
        total += _vectors(second, codebooks, first + behind, at, inside, rows, L, ROWS, SECOND - 1)
    if not TALL:
        for book in tl.static_range(1, BOOKS):
            at = (held + book * height)[:, None] * width + column
            total += _vectors(indices, codebooks, book * (MOST + 1), at, inside, rows, L, ROWS, MOST)
    return total


@triton.jit
def _row(number, LENGTH: tl.constexpr, L: tl.constexpr, TALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of a program's number, and whether it is one."""
    if TALL:
        return number // L * LENGTH + number % L, number % L < LENGTH
    return number, number >= 0


@triton.jit(do_not_specialize=["each"])
def coded_vector(  # type: ignore[no-untyped-def]
    x,  # float16 (steps * 64,)
    scale,  # float32 (steps / 2,)
    out,  # (splits, rows)
    indices,
    second,
    codebooks,
    row_scale,  # (rows,), (1,) or None
    rows,
    height,
    width,
    steps,
    each,
    book_steps,
    BOOKS: tl.constexpr,
    MOST: tl.constexpr,
    SECOND: tl.constexpr,
    LENGTH: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    TALL: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token times BN rows over ``each`` steps, on CUDA cores. Grid: (blocks of rows, splits)."""
    H: tl.constexpr = BN // L if TALL else BN
    V: tl.constexpr = 64 if TALL else 64 // L
    held = tl.minimum(tl.program_id(0) * H + tl.arange(0, H), height * ROWS - 1).to(tl.int64)
    first = tl.program_id(1) * each
    total = tl.zeros((H, V, L), tl.float32)
    for step in tl.range(first, tl.minimum(first + each, steps), num_stages=STAGES):
        if TALL:
            seen = tl.load(x + step * 64 + tl.arange(0, 64))[None, :, None]
        else:
            seen = tl.load(x + step * 64 + tl.arange(0, V)[:, None] * L + tl.arange(0, L)[None, :])[None]
        worth = tl.load(scale + step // 2)
        weights = numbers(
            indices, second, codebooks, held, step, height, width, book_steps, BOOKS, MOST, SECOND,
            L, ROWS, TALL,
        )  # fmt: skip
        total += weights * (seen.to(tl.float32) * worth)
    sums = tl.reshape(tl.sum(total, 1), (BN,)) if TALL else tl.sum(tl.sum(total, 2), 1)
    row, is_one = _row(tl.program_id(0) * BN + tl.arange(0, BN), LENGTH, L, TALL)
    kept = is_one & (row < rows)
    if row_scale is not None:
        scale_row = row * 0 if ONE_SCALE else row // ROWS
        sums *= tl.load(row_scale + scale_row, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1) * rows + row, cast(sums, out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens", "token_blocks", "each"])
def coded_tile(  # type: ignore[no-untyped-def]
    x,  # float16 (tokens, steps * 64)
    scale,  # float32 (tokens, steps / 2)
    out,  # (splits, tokens, rows)
    indices,
    second,
    codebooks,
    row_scale,
    token_rows,  # int32 (token_blocks * BM,): ``expert_rows``, or None
    experts,  # int32 (token_blocks,), or None: then there are indices, codebooks and scales of every expert
    tokens,
    token_blocks,
    rows,
    out_row,
    height,
    width,
    steps,
    each,
    book_steps,
    books,  # numbers of an expert's codebooks; 0 where all have the same
    factor,  # a power of two: times it the weights are float16's
    inverse,
    SAME: tl.constexpr,
    BOOKS: tl.constexpr,
    MOST: tl.constexpr,
    SECOND: tl.constexpr,
    LENGTH: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    TALL: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM tokens times BN rows over ``each`` steps, on tensor cores.

    Grid: (token_blocks * blocks of rows, splits): programs that share weights follow each other. With experts
    a token is a pair of token and expert, ``SAME`` of which have a row of x, and those of a block have one
    expert, or none.
    """
    H: tl.constexpr = BN // L if TALL else BN
    token_block = tl.program_id(0) % token_blocks
    token = token_block * BM + tl.arange(0, BM)
    if experts is not None:
        expert = tl.load(experts + token_block).to(tl.int64)
        if expert < 0:
            return
        indices += expert * BOOKS * height * width
        codebooks += expert * books
        if SECOND > 0:
            second += expert * height * width
        if row_scale is not None:
            row_scale += expert * (1 if ONE_SCALE else height)
        token = tl.load(token_rows + token)
    block = tl.program_id(0) // token_blocks
    there = token < tokens
    held = tl.minimum(block * H + tl.arange(0, H), height * ROWS - 1).to(tl.int64)
    first = tl.program_id(1) * each
    seen_row = (token // SAME).to(tl.int64)
    x_rows = x + seen_row[:, None] * (steps * 64)
    total = tl.zeros((BN, BM), tl.float32)
    for step in range(first, tl.minimum(first + each, steps)):
        seen = tl.load(x_rows + (step * 64 + tl.arange(0, 64))[None, :], mask=there[:, None], other=0.0)
        weights = numbers(
            indices, second, codebooks, held, step, height, width, book_steps, BOOKS, MOST, SECOND,
            L, ROWS, TALL,
        )  # fmt: skip
        if TALL:
            weights = tl.permute(weights, (0, 2, 1))
        weights = cast(tl.reshape(weights, (BN, 64)) * factor, tl.float16)
        part = dot(weights, tl.trans(seen), tl.zeros((BN, BM), tl.float32))
        worth = tl.load(scale + seen_row * (steps // 2) + step // 2, mask=there, other=0.0)
        total += part * (worth * inverse)[None, :]
    row, is_one = _row(block * BN + tl.arange(0, BN), LENGTH, L, TALL)
    kept = is_one & (row < rows)
    if row_scale is not None:
        scale_row = row * 0 if ONE_SCALE else row // ROWS
        worth = tl.load(row_scale + scale_row, mask=kept, other=0.0).to(tl.float32)
        total *= worth[:, None]
    place = (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * out_row + row[None, :]
    tl.store(out + place, cast(tl.trans(total), out.dtype.element_ty), mask=there[:, None] & kept[None, :])
