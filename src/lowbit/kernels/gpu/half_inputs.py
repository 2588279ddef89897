"""x as float16 beside a scale for each token and 128 columns, a power of two: what codebooks' numbers meet.

Codebooks and trellises are float16's numbers, and the tensor cores multiply numbers of one type: bfloat16
would cut three bits of each. float16 in its turn does not reach as far as x may, so each 128 columns of a
token are divided by the power of two that brings the largest of them to 2^14 … 2^15. What x loses is 2^-12
of a number, or 2^-40 of the largest one's size where it is smaller than 2^-28 of that; of bfloat16 x nothing
but the latter. Sums are float32, and a run's meet its scale: no product can overflow that would not without.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast
from lowbit.kernels.gpu.rotation import by_signs, over

BLOCK = 128  # columns that share a scale


@triton.jit
def halves(values):  # type: ignore[no-untyped-def]
    """float32 (M, N) -> float16 (M, N), float32 (M,): numbers and what they are worth."""
    largest = tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum(largest >> 23, 28), 254)
    scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return cast(values * inverse[:, None], tl.float16), scale


@triton.jit
def _of_expert(numbers, chosen, token, inside, experts, width):  # type: ignore[no-untyped-def]
    """Where each token's expert, of those in (experts, width), has its numbers, (M, 1): never outside."""
    if chosen is not None:
        expert = tl.load(chosen + token, mask=inside, other=0).to(tl.int64)
        numbers += (tl.minimum(tl.maximum(expert, 0), experts - 1) * width)[:, None]
    return numbers


@triton.jit(do_not_specialize=["tokens"])
def scaled_halves(  # type: ignore[no-untyped-def]
    x,  # (tokens / SAME, inputs)
    x_row,
    out,  # float16 (tokens, blocks * 128)
    scale,  # float32 (tokens, blocks)
    order,  # int32 (blocks * 128,): the input of each column, -1 for none; None: they are the inputs
    multiplier,  # float32 (blocks * 128,), or None
    chosen,  # int64 (tokens,), the expert of each: order and multiplier are then (experts, …); or None
    tokens,
    inputs,
    blocks,
    experts,
    SAME: tl.constexpr,
    M: tl.constexpr,
):
    """x's columns as a weight has them, 0 where it has none. Grid: (groups of M blocks of any token,).

    With experts a token is one of ``SAME`` pairs of a row of x.
    """
    unit = tl.program_id(0) * M + tl.arange(0, M)
    token = (unit // blocks).to(tl.int64)
    inside = token < tokens
    at = (unit % blocks * 128)[:, None] + tl.arange(0, 128)[None, :]
    column = at
    if order is not None:
        column = tl.load(_of_expert(order, chosen, token, inside, experts, blocks * 128) + at)
    there = inside[:, None] & (column >= 0) & (column < inputs)
    row = (token // SAME)[:, None] * x_row
    values = tl.load(x + row + column, mask=there, other=0.0).to(tl.float32)
    if multiplier is not None:
        values *= tl.load(_of_expert(multiplier, chosen, token, inside, experts, blocks * 128) + at)
    numbers, worth = halves(values)
    tl.store(out + token[:, None] * (blocks * 128) + at, numbers, mask=inside[:, None])
    tl.store(scale + unit, worth, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def turned_halves(  # type: ignore[no-untyped-def]
    x,  # (tokens / SAME, columns)
    x_row,
    out,  # float16 (tokens, columns), a block's columns in the order of a trellis
    scale,  # float32 (tokens, blocks)
    inputs,  # float16 (columns,), or (experts, columns)
    table,  # int8 (128, 128)
    chosen,  # int64 (tokens,): the expert of each, or None
    tokens,
    blocks,
    experts,
    divisor,
    SAME: tl.constexpr,
    M: tl.constexpr,
):
    """x * inputs, turned by Hadamard's matrix of 128. Grid: (groups of M blocks of any token,).

    With experts a token is one of ``SAME`` pairs of a row of x.
    """
    unit = tl.program_id(0) * M + tl.arange(0, M)
    token = (unit // blocks).to(tl.int64)
    inside = token < tokens
    place = tl.arange(0, 128)
    at = (unit % blocks * 128)[:, None] + place[None, :]
    own = (token // SAME)[:, None] * x_row
    values = tl.load(x + own + at, mask=inside[:, None], other=0.0).to(tl.float32)
    values *= tl.load(_of_expert(inputs, chosen, token, inside, experts, blocks * 128) + at).to(tl.float32)
    field, q, k = place // 32, place % 32 // 8, place % 8
    column = 16 * k + 2 * q + field % 2 + 8 * (field // 2)
    signs = tl.load(table + place[:, None] * 128 + column[None, :])
    numbers, worth = halves(over(by_signs(values, signs, ""), divisor))
    tl.store(out + token[:, None] * (blocks * 128) + at, numbers, mask=inside[:, None])
    tl.store(scale + unit, worth, mask=inside)


@triton.jit(do_not_specialize=["tokens", "splits"])
def turned_sums(  # type: ignore[no-untyped-def]
    parts,  # float32 (splits, tokens, rows)
    out,  # (tokens, rows)
    out_row,
    outputs,  # float16 (rows,), or (experts, rows)
    table,
    chosen,  # int64 (tokens,): the expert of each, or None
    tokens,
    blocks,
    experts,
    splits,
    divisor,
    M: tl.constexpr,
):
    """The sum of all splits in their order, turned, * outputs. Grid: (groups of M blocks of any token,)."""
    unit = tl.program_id(0) * M + tl.arange(0, M)
    token = (unit // blocks).to(tl.int64)
    inside = (token < tokens)[:, None]
    place = tl.arange(0, 128)
    at = (unit % blocks * 128)[:, None] + place[None, :]
    total = tl.zeros((M, 128), tl.float32)
    for split in range(splits):
        row = (split * tokens + token)[:, None] * (blocks * 128)
        total += tl.load(parts + row + at, mask=inside, other=0.0)
    signs = tl.load(table + place[:, None] * 128 + place[None, :])
    own = _of_expert(outputs, chosen, token, token < tokens, experts, blocks * 128) + at
    total = over(by_signs(total, signs, ""), divisor) * tl.load(own).to(tl.float32)
    tl.store(out + token[:, None] * out_row + at, cast(total, out.dtype.element_ty), mask=inside)
