"""The Triton kernels of trellises (EXL3): x that was turned @ T^T, and what rows of a weight are made of.

T's numbers are made where they are needed, by one decoder. Words lie as int32 (rows / 16, columns / 128,
8 ``BITS``, 8): tiles of 16 inputs by 16 outputs as a file has them, whose bits lie from the highest of each
word, of eight neighbours (128 inputs) the first words, then the second ones, and so on: the eight that a
quarter of a warp loads lie together.

A lane of the tensor core operand that a tile was made for holds 8 weights of neighbouring bits, 4 for one
output and 4 for the output 8 further; four lanes have an output's 16 inputs. So of a row and a lane's place
``q`` the last bits of all four codes lie in 3 ``BITS`` + 16, and two words hold them. The four are *fields*:
field j has (rows, 32) numbers, column q * 8 + k of which meets input

    16 k + 2 q + j % 2 + 8 (j // 2)

of the 128, which is how ``half_inputs`` lays x out. A code costs a shift and a mask, a code book's number a
product, two or three operations on its bits and one addition of float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast, dot


@triton.jit
def _half(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _number(code, BOOK: tl.constexpr):  # type: ignore[no-untyped-def]
    """float16: what a code book has for 16 bits, in uint32."""
    if BOOK == "mul1":
        product = code * 0x83DCD12D
        pairs = (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)
        total = (pairs & 0xFFFF) + (pairs >> 16)
        whole = (total | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - 1024.0)
        # Both constants are float16's; the product is exact.
        number = cast(whole * 0.00676727294921875 - 10.3828125, tl.float16)
    else:
        if BOOK == "3inst":
            product = code * 89226354 + 64248484
        else:
            tl.static_assert(BOOK == "mcg")
            product = code * 0xCBAC1FED
        bits = (product & 0x8FFF8FFF) ^ 0x3B603B60
        number = _half(bits) + _half(bits >> 16)
    return number


@triton.jit
def places(rows, blocks, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """For rows (R,), int64, of a weight: where (R, 32) groups of four codes end in its first 128 columns:
    int64 the place of the word, int32 how much further the word before it is, and how many bits follow."""
    column = tl.arange(0, 32)[None, :]
    row = (rows % 16).to(tl.int32)[:, None]
    end = BITS * (32 * (row % 8) + 8 * (column // 8) + 4 * (row // 8) + 4)
    word = (end - 1) // 32
    before = (word + (8 * BITS - 1)) % (8 * BITS) - word
    first = (rows // 16)[:, None] * (blocks * (64 * BITS)) + column % 8
    return first + word * 8, before * 8, (word + 1) * 32 - end


@triton.jit
def groups(words, at, before, after, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of groups of four codes, the last one's lowest: uint32 where they fit, else uint64."""
    last = tl.load(words + at).to(tl.uint32, bitcast=True).to(tl.uint64)
    first = tl.load(words + at + before).to(tl.uint32, bitcast=True).to(tl.uint64)
    bits = ((first << 32) | last) >> after.to(tl.uint64)
    return bits.to(tl.uint32) if 3 * BITS + 16 <= 32 else bits


@triton.jit
def numbers(words, at, before, held, after, FIELD: tl.constexpr, BITS: tl.constexpr, BOOK: tl.constexpr):  # type: ignore[no-untyped-def]
    """float16 (R, 32): one field of T."""
    code = (held >> (BITS * (3 - FIELD))).to(tl.uint32) & 0xFFFF
    if BITS == 7 and FIELD == 0:
        # 37 bits, and where 28 follow them 36 are in two words: the last is the lowest of a third.
        wraps = before > 0
        third = tl.where(wraps, before - 8, tl.where(at // 8 % (8 * BITS) == 1, (8 * BITS - 2) * 8, -16))
        lacking = after == 28
        bit = tl.load(words + at + third, mask=lacking, other=0).to(tl.uint32, bitcast=True) & 1
        code |= bit << 15
    return _number(code, BOOK)


@triton.jit(do_not_specialize=["each"])
def trellis_vector(  # type: ignore[no-untyped-def]
    x,  # float16 (columns,), turned
    scale,  # float32 (blocks,)
    out,  # float32 (splits, rows)
    words,
    rows,
    blocks,
    each,
    BITS: tl.constexpr,
    BOOK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token times BN rows of T over ``each`` blocks of 128 columns, on CUDA cores.

    Grid: (rows / BN, splits).
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    at, before, after = places(row.to(tl.int64), blocks, BITS)
    first = tl.program_id(1) * each
    total = tl.zeros((BN, 32), tl.float32)
    for block in tl.range(first, tl.minimum(first + each, blocks), num_stages=STAGES):
        here = at + block * (64 * BITS)
        held = groups(words, here, before, after, BITS)
        worth = tl.load(scale + block)
        for field in tl.static_range(4):
            seen = tl.load(x + block * 128 + field * 32 + tl.arange(0, 32)).to(tl.float32) * worth
            total += (
                numbers(words, here, before, held, after, field, BITS, BOOK).to(tl.float32) * seen[None, :]
            )
    tl.store(out + tl.program_id(1) * rows + row, tl.sum(total, 1))


@triton.jit(do_not_specialize=["tokens", "token_blocks", "each"])
def trellis_tile(  # type: ignore[no-untyped-def]
    x,  # float16 (tokens, columns), turned
    scale,  # float32 (tokens, blocks)
    out,  # float32 (splits, tokens, rows)
    words,  # of every expert, where there are experts
    token_rows,  # int32 (token_blocks * BM,): ``expert_rows``, or None
    experts,  # int32 (token_blocks,), or None
    tokens,
    token_blocks,
    rows,
    blocks,
    each,
    BITS: tl.constexpr,
    BOOK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM tokens times BN rows of T over ``each`` blocks of 128 columns, on tensor cores.

    Grid: (token_blocks * rows / BN, splits): programs that share weights follow each other. With experts a
    token is a pair of token and expert, and those of a block have one expert, or none.
    """
    token_block = tl.program_id(0) % token_blocks
    token = token_block * BM + tl.arange(0, BM)
    if experts is not None:
        expert = tl.load(experts + token_block).to(tl.int64)
        if expert < 0:
            return
        words += expert * (rows // 16) * blocks * (64 * BITS)
        token = tl.load(token_rows + token)
    row = (tl.program_id(0) // token_blocks) * BN + tl.arange(0, BN)
    there = token < tokens
    at, before, after = places(row.to(tl.int64), blocks, BITS)
    first = tl.program_id(1) * each
    x_rows = x + token.to(tl.int64)[:, None] * (blocks * 128)
    total = tl.zeros((BN, BM), tl.float32)
    for block in range(first, tl.minimum(first + each, blocks)):
        here = at + block * (64 * BITS)
        held = groups(words, here, before, after, BITS)
        part = tl.zeros((BN, BM), tl.float32)
        for field in tl.static_range(4):
            column = block * 128 + field * 32 + tl.arange(0, 32)
            seen = tl.load(x_rows + column[None, :], mask=there[:, None], other=0.0)
            part = dot(numbers(words, here, before, held, after, field, BITS, BOOK), tl.trans(seen), part)
        worth = tl.load(scale + token.to(tl.int64) * blocks + block, mask=there, other=0.0)
        total += part * worth[None, :]
    place = (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + place, tl.trans(total), mask=there[:, None])


@triton.jit
def trellis_row(  # type: ignore[no-untyped-def]
    out,  # float32 (ids, columns)
    ids,
    words,
    table,  # int8 (128, 128)
    rows,
    blocks,
    divisor,
    BITS: tl.constexpr,
    BOOK: tl.constexpr,
):
    """H T^T for rows that are looked up, ids outside being the nearest row's. Grid: (ids, blocks)."""
    wanted = tl.maximum(tl.minimum(tl.load(ids + tl.program_id(0)).to(tl.int64), rows - 1), 0)
    place, block = tl.arange(0, 128), tl.program_id(1)
    at, before, after = places(wanted // 128 * 128 + place, blocks, BITS)
    at += block * (64 * BITS)
    held = groups(words, at, before, after, BITS)
    signs = tl.load(table + wanted % 128 * 128 + place).to(tl.float32)
    to = out + tl.program_id(0).to(tl.int64) * (blocks * 128) + block * 128
    column = tl.arange(0, 32)
    for field in tl.static_range(4):
        values = numbers(words, at, before, held, after, field, BITS, BOOK).to(tl.float32)
        total = tl.sum(values * signs[:, None], 0) / divisor
        tl.store(to + 16 * (column % 8) + 2 * (column // 8) + (field % 2 + 8 * (field // 2)), total)
