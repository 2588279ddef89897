"""Grouped products of 8-bit inputs and 8-bit weights: ``expert_products`` on int8 and fp8 tensor cores.

What ``eight_bit`` is to a layer this is to all experts of a mixture: int8 codes are summed in int32,
exactly, 8-bit floats by fp8 tensor cores (compute capability 8.9 and later; float16 before) whose sums are
added up in float32 every BLOCK_K columns, groups of columns are scaled before they are added, and zero points
of x leave the sum by the weight's row sums. Blocks of rows with one expert each come from ``expert_rows``.

A product is (outputs, rows), as in ``expert_products``: outputs are many even where an expert has one row.
Of a gated matrix a program has BLOCK_N / 2 gates and the rows that belong to them, in sums of their own, so
that a tile of either lies in one block of scales.

Blocks, by the rows that one expert gets; by reasoning, none of it has been timed on a GPU:

- 16 and 32 rows: time is that of reading weights. A program reads 64 of their rows, 8 KiB in 128 columns,
  with three such steps under way while it computes a fourth: 24 KiB, and as much again from a second program
  on the multiprocessor (an H100 needs about 25 KiB on each of 132, an H200 36). A token of DeepSeek-V3 makes
  8 * 4096 / 64 = 512 programs for gate and up, one of Qwen3-30B-A3B (8 of 1536 rows) 192: columns need no
  splitting. Hopper's instructions for 8-bit floats take 64 rows of a weight at least, below them Triton
  multiplies float16: where twice as tall tiles of gates still give every multiprocessor a program (DeepSeek),
  they have 64.
- 64 and 128 rows: the tensor cores are the bound. 128 outputs, so that a byte of x is used 128 times and one
  of the weight as often as there are rows; 64 sums a thread, and as many of a step where scales wait for its
  end. Three steps of 32 KiB fit the shared memory of every device.
- Rows that are no multiple of 16 bytes are read byte by byte: small tiles for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.elementwise import activation_number
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.eight_bit import (
    FORMATS,
    EightBitWeight,
    as_bytes,
    fp8_dots,
    multiprocessors,
    numbers,
    operand,
)
from lowbit.kernels.gpu.elementwise import activate
from lowbit.kernels.gpu.expert_products import BAND, Blocks, Rows, place
from lowbit.kernels.gpu.expert_rows import SortedPairs
from lowbit.kernels.gpu.language import cast, dot

BLOCKS = {16: Blocks(64, 4, 4), 32: Blocks(64, 4, 4), 64: Blocks(128, 4, 3), 128: Blocks(128, 8, 3)}
ODD_BLOCKS = {16: Blocks(32, 4, 2), 32: Blocks(32, 4, 2), 64: Blocks(32, 4, 2), 128: Blocks(32, 8, 2)}


@triton.jit
def _done(  # type: ignore[no-untyped-def]
    total,  # (BLOCK_N, BLOCK_M): whole numbers or floats
    n,
    x_rows,
    expert,
    outputs,
    factor,
    x_zeros,
    w_scale,
    w_sums,
    bias,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    BIASED: tl.constexpr,
):
    """float32: sums of the weight's rows n with all that is still to be done to them."""
    if ZERO:
        total -= tl.load(w_sums + expert * outputs + n)[:, None] * tl.load(x_zeros + x_rows)[None, :]
    y = total.to(tl.float32)
    if X_GROUP == 0:
        y *= tl.load(factor + x_rows)[None, :]
    if W_GROUP == 0:
        y *= tl.load(w_scale + expert * outputs + n)[:, None]
    if BIASED:
        y += tl.load(bias + expert * outputs + n)[:, None]
    return y


@triton.jit(do_not_specialize=["group_stride", "blocks", "pairs"])
def _multiply(  # type: ignore[no-untyped-def]
    x,  # (rows, columns) codes
    factor,  # float32 (rows,), where X_GROUP is 0
    x_scales,  # float32 (groups, rows)
    x_zeros,  # int32 (rows,)
    rows,
    block_experts,
    bias,  # float32 (experts, outputs)
    out,
    w,  # (experts, outputs, columns) codes
    w_scale,  # float32 (experts, outputs) or (experts, blocks of rows, groups)
    w_sums,  # int32 (experts, outputs)
    x_stride,
    group_stride,
    row_stride,
    out_stride,
    blocks,
    pairs,
    outputs,
    columns,
    w_stride,  # scales of an expert
    w_groups,
    w_rows,  # rows of a block that shares a scale
    DIVISOR: tl.constexpr,
    X_FORMAT: tl.constexpr,
    W_FORMAT: tl.constexpr,
    FP8_DOT: tl.constexpr,
    X_GROUP: tl.constexpr,  # columns that share a scale; 0: all
    W_GROUP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # rows of a tile lie in one block of scales
    ZERO: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # -1: none
    EVEN: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of out
    BLOCK_K: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION >= 0
    width = outputs // 2 if GATED else outputs
    block, tile = place(blocks, tl.cdiv(width, BLOCK_N), BAND)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
    there = pair < pairs
    x_rows = tl.where(there, pair // DIVISOR, 0).to(tl.int64)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(column, width - 1)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + x_rows[:, None] * x_stride + k[None, :]
    w += expert * outputs * columns
    w_tile = w + n.to(tl.int64)[:, None] * columns + k[None, :]
    partner_tile = w + (n.to(tl.int64) + width)[:, None] * columns + k[None, :]
    if W_GROUP != 0:
        w_scale += expert * w_stride
        if ONE_BLOCK:
            w_block = w_scale + tile * BLOCK_N // w_rows * w_groups
            partner_block = w_scale + (tile * BLOCK_N + width) // w_rows * w_groups
        else:
            w_block = w_scale + (n // w_rows)[:, None] * w_groups
            partner_block = w_scale + ((n + width) // w_rows)[:, None] * w_groups

    WHOLE: tl.constexpr = X_FORMAT == "int8" and X_GROUP == 0 and W_GROUP == 0
    PART: tl.constexpr = tl.int32 if X_FORMAT == "int8" else tl.float32
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
    if GATED:
        partner_total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
    for step in range(tl.cdiv(columns, BLOCK_K)):
        left = columns - step * BLOCK_K
        seen = tl.trans(operand(numbers(x_tile, k[None, :], left, EVEN), X_FORMAT, FP8_DOT))
        a = operand(numbers(w_tile, k[None, :], left, EVEN), W_FORMAT, FP8_DOT)
        if GATED:
            c = operand(numbers(partner_tile, k[None, :], left, EVEN), W_FORMAT, FP8_DOT)
        if WHOLE or (X_GROUP == 0 and W_GROUP == 0 and not FP8_DOT):
            total = dot(a, seen, total)
            if GATED:
                partner_total = dot(c, seen, partner_total)
        else:
            scale = 1.0
            partner_scale = 1.0
            if W_GROUP != 0:
                scale = tl.load(w_block + step * BLOCK_K // W_GROUP)
                if GATED:
                    partner_scale = tl.load(partner_block + step * BLOCK_K // W_GROUP)
            if X_GROUP != 0:
                group = step * BLOCK_K // X_GROUP
                x_part = tl.load(x_scales + x_rows * row_stride + group * group_stride)[None, :]
                scale = x_part * scale
                partner_scale = x_part * partner_scale
            zeros = tl.zeros((BLOCK_N, BLOCK_M), PART)
            total += dot(a, seen, zeros).to(tl.float32) * scale
            if GATED:
                partner_total += dot(c, seen, zeros).to(tl.float32) * partner_scale
        x_tile += BLOCK_K
        w_tile += BLOCK_K
        partner_tile += BLOCK_K

    y = _done(
        total, n, x_rows, expert, outputs, factor, x_zeros, w_scale, w_sums, bias,
        X_GROUP, W_GROUP, ZERO, BIASED,
    )  # fmt: skip
    if GATED:
        up = _done(
            partner_total, n + width, x_rows, expert, outputs, factor, x_zeros, w_scale, w_sums, bias,
            X_GROUP, W_GROUP, ZERO, BIASED,
        )  # fmt: skip
        y = activate(y, up, ACTIVATION)
    at = pair.to(tl.int64)[:, None] * out_stride + column[None, :]
    mask = there[:, None] & (column < width)[None, :]
    tl.store(out + at, cast(tl.trans(y), out.dtype.element_ty), mask=mask)


def stacked(weights: Sequence[EightBitWeight], codes: Tensor) -> EightBitWeight:
    """The weights of all experts as one, every tensor with their number before it; ``codes`` are there."""
    first = weights[0]
    sums = None if first.sums is None else torch.stack([w.sums for w in weights if w.sums is not None])
    scale = torch.stack([weight.scale for weight in weights])
    return EightBitWeight(codes, scale, first.group, first.block_rows, sums)


def multiply(
    weight: EightBitWeight,
    given: Rows,
    sorted_: SortedPairs,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
) -> None:
    """``expert_products.multiply`` of a stacked weight and codes of x."""
    x, scales = given.x, given.scales
    _, outputs, columns = weight.codes.shape
    number = -1 if activation is None else activation_number(activation)
    whole = x.dtype is torch.int8
    assert x.stride(1) == 1 and out.stride(1) == 1 and x.shape[1] == columns
    assert bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.shape[1] == outputs)
    assert whole == (weight.codes.dtype is torch.int8) and (scales is None) == (given.group == 0)
    fp8 = not whole and fp8_dots(x.device)
    blocks = (ODD_BLOCKS if columns % 16 else BLOCKS)[sorted_.block_m]
    block_k = 128 if (whole or fp8) and columns % 16 == 0 else 64
    block_k = min(given.group or block_k, weight.group or block_k, block_k)
    width = outputs if number < 0 else outputs // 2
    tall = blocks.n if number < 0 else blocks.n // 2
    if fp8 and tall == 32 and sorted_.blocks * triton.cdiv(width, 64) >= multiprocessors(x.device):
        tall = 64
    inside = weight.block_rows % tall == 0 and (number < 0 or width % weight.block_rows == 0)
    runtime.launch(
        _multiply,
        (sorted_.blocks * triton.cdiv(width, tall),),
        *(as_bytes(x), given.factor, scales, given.zeros, sorted_.rows, sorted_.experts, bias, out),
        *(as_bytes(weight.codes), weight.scale, weight.sums if given.zeros is not None else None),
        x.stride(0),
        *((0, 0) if scales is None else scales.stride()),
        *(out.stride(0), sorted_.blocks, sorted_.pairs, outputs, columns),
        weight.scale[0].numel(),
        weight.scale.shape[-1] if weight.group else 0,
        weight.block_rows,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        DIVISOR=given.divisor,
        X_FORMAT=FORMATS[x.dtype],
        W_FORMAT=FORMATS[weight.codes.dtype],
        FP8_DOT=fp8,
        X_GROUP=given.group,
        W_GROUP=weight.group,
        ONE_BLOCK=bool(weight.group) and inside,
        ZERO=given.zeros is not None,
        BIASED=bias is not None,
        ACTIVATION=number,
        EVEN=columns % block_k == 0,
        BAND=BAND,
        BLOCK_M=sorted_.block_m,
        BLOCK_N=tall,
        BLOCK_K=block_k,
    )
