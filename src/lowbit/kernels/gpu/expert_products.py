"""Grouped products: one matrix of all experts, each with the rows that chose it, in one launch.

A program is a block of rows of one expert (``expert_rows``) and a tile of that expert's outputs; blocks
behind the last one end at once. It goes through the columns in steps of a few tiles (``weight_tiles``):
codes are exact in x's type, their products are summed in float32, and a group's scales meet those sums, so
that weights are never rounded. Values of tables that bfloat16 would round (nf4) are two numbers, and two
products. float32 x is multiplied as such, on CUDA cores.

A product is (outputs, rows) = weight tile @ x tile.T, so that a decoded tile goes from registers to the
tensor cores and only x is read from shared memory. Of a gated matrix (gate rows, then as many up rows) a
tile takes gate and up rows in turn, so that it holds all that an activation combines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.elementwise import activation_number
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.elementwise import activate
from lowbit.kernels.gpu.expert_rows import SortedPairs
from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.gpu.weight_layout import Layout, arguments
from lowbit.kernels.gpu.weight_tiles import load_run, run_operands, run_values, scale_of, zero_of


@dataclass(frozen=True)
class Rows:
    """What meets a matrix: x (rows, columns), row ``pair // divisor`` of it that of a pair.

    ``factor``: float32, of each row or one, the product is multiplied by it. ``scales``: float32 (groups,
    rows) of ``group`` columns each, x is codes then. Codes of 8 bits (``expert_eight_bit``) have scales or a
    factor of each row, and may have ``zeros``, int32 of each row.
    """

    x: Tensor
    divisor: int
    factor: Tensor | None = None
    scales: Tensor | None = None
    group: int = 0
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Stack:
    """One weight of every expert. ``layout``: of a single one, None where they are dense, (out, in) matrices.

    ``buffers``: (experts, ...) each. ``order``: int64 (experts, in), the input column of each stored one.
    ``split``: whether values of the table have to be two bfloat16 numbers.
    """

    shape: tuple[int, int]
    layout: Layout | None
    buffers: dict[str, Tensor]
    order: Tensor | None
    split: bool

    gates = True  # an activation may be part of the launch

    @property
    def most_rows(self) -> int:
        """Rows of a block at most: steps of codes below 4 bits have many tiles, each in registers."""
        return 64 if self.layout is not None and self.layout.fields > 2 else 128


@triton.jit
def place(blocks, tiles, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's block of rows and tile of outputs: bands of blocks share weights in the L2 cache."""
    number = tl.program_id(0)
    in_band = BAND * tiles
    first = number // in_band * BAND
    height = tl.minimum(blocks - first, BAND)
    return first + number % in_band % height, number % in_band // height


@triton.jit
def _outputs(tile, outputs, BLOCK_N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64 (BLOCK_N,): a tile's rows of the matrix, clamped."""
    n = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), outputs - 1)
    if GATED:
        n = n % 2 * (outputs // 2) + n // 2
    return n.to(tl.int64)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    total,
    n,
    x_rows,
    pair,
    there,
    expert,
    tile,
    factor,
    bias,
    out,
    out_stride,
    outputs,
    FACTOR: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What follows a product (BLOCK_N, BLOCK_M): factor, bias, gate; stored to the pairs' rows."""
    if FACTOR == "row":
        total *= tl.load(factor + x_rows)[None, :]
    if FACTOR == "one":
        total *= tl.load(factor)
    if BIASED:
        total += tl.load(bias + expert * outputs + n)[:, None]
    width: tl.constexpr = BLOCK_N if ACTIVATION < 0 else BLOCK_N // 2
    total = tl.trans(total)
    if ACTIVATION >= 0:
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N // 2, 2)))
        total = activate(gate, up, ACTIVATION)
        outputs = outputs // 2
    column = tile * width + tl.arange(0, width)
    mask = there[:, None] & (column < outputs)[None, :]
    at = pair.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out + at, cast(total, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["group_stride", "blocks", "pairs"])
def _packed(  # type: ignore[no-untyped-def]
    x,
    factor,
    x_scales,
    order,
    rows,
    block_experts,
    bias,
    out,
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
    x_stride,
    group_stride,
    row_stride,
    out_stride,
    blocks,
    pairs,
    outputs,
    columns,
    stride4,
    stride2,
    stride1,
    stride8,
    level0,
    level1,
    DIVISOR: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    ORDERED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVERY: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
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
    """EVERY: what has one scale: a "tile", a "step" of RUNS runs, or all of a row until its "end"."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    TAKEN: tl.constexpr = "exact" if ZERO == "exact" else "none"
    block, tile = place(blocks, tl.cdiv(outputs, BLOCK_N), BAND)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
    there = pair < pairs
    x_rows = tl.where(there, pair // DIVISOR, 0).to(tl.int64)
    n = _outputs(tile, outputs, BLOCK_N, ACTIVATION >= 0)
    if BITS == 8:
        codes += expert * stride8
    if BITS >= 4 and BITS < 8:
        plane4 += expert * stride4
    if BITS == 2 or BITS == 3 or BITS == 6 or BITS == 7:
        plane2 += expert * stride2
    if BITS == 1 or BITS == 3 or BITS == 5 or BITS == 7:
        plane1 += expert * stride1
    if ZERO != "none":
        zeros += expert * level0
    scale0 += expert * level0
    if LEVELS == 2:
        scale1 += expert * level1
    if OFFSET:
        offset0 += expert * level0
        if LEVELS == 2:
            offset1 += expert * level1
    if ORDERED:
        order += expert * columns
    x += x_rows[:, None] * x_stride

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(tl.cdiv(columns, RUNS * FIELDS * TILE)):
        part = total
        sums = tl.zeros((BLOCK_M,), tl.float32)
        if EVERY == "step":
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(RUNS):
            run = step * RUNS + i
            low, middle, high = load_run(plane4, plane2, plane1, codes, n, run, columns, BITS, TILE, FIELDS)
            for field in tl.static_range(FIELDS):
                first = (run * FIELDS + field) * TILE
                column = first + tl.arange(0, TILE)
                inside = tl.minimum(first, columns - 1)  # a run's last tiles may lie outside
                source = column
                if ORDERED:
                    source = tl.load(order + tl.minimum(column, columns - 1))
                if EVEN:
                    seen = tl.load(x + source[None, :])
                else:
                    seen = tl.load(x + source[None, :], mask=(column < columns)[None, :], other=0.0)
                zero = zero_of(zeros, n, inside, columns, ZERO, FLAT, ROWS0, COLUMNS0)
                if SPLIT and tl.float32 != DTYPE:
                    values = run_values(
                        low, middle, high, table, zero, run, field, BITS, FIELDS, KIND, BASE, TAKEN
                    )
                    w = cast(values, DTYPE)
                else:
                    w = run_operands(
                        low, middle, high, table, zero, run, field, BITS, FIELDS, KIND, BASE, TAKEN, DTYPE
                    )
                if EVERY == "tile":
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = dot(w, tl.trans(seen), part)
                if SPLIT and tl.float32 != DTYPE:
                    part = dot(cast(values - w.to(tl.float32), DTYPE), tl.trans(seen), part)
                if OFFSET or ZERO == "float":
                    own = tl.sum(seen.to(tl.float32), 1)
                    sums = own if EVERY == "tile" else sums + own
                if EVERY == "tile" or (EVERY == "step" and i == RUNS - 1 and field == FIELDS - 1):
                    if EVERY == "step":
                        inside = step * RUNS * FIELDS * TILE
                    scale = scale_of(
                        scale0, scale1, n, inside, columns, FLAT, LEVELS,
                        ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                    )  # fmt: skip
                    part *= scale[:, None]
                    if ZERO == "float":
                        zero = zero_of(zeros, n, inside, columns, ZERO, FLAT, ROWS0, COLUMNS0)
                        part -= (zero * scale)[:, None] * sums[None, :]
                    if OFFSET:
                        offset = scale_of(
                            offset0, offset1, n, inside, columns, FLAT, LEVELS,
                            ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
                        )  # fmt: skip
                        part += offset[:, None] * sums[None, :]
                    if GROUP > 0:
                        part *= tl.load(x_scales + x_rows * row_stride + inside // GROUP * group_stride)[
                            None, :
                        ]
                    total += part
        if EVERY == "end":
            total = part
    if EVERY == "end":
        scale = scale_of(
            scale0, scale1, n, 0, columns, FLAT, LEVELS,
            ROWS0, COLUMNS0, SCALE0, ROWS1, COLUMNS1, SCALE1,
        )  # fmt: skip
        total *= scale[:, None]
    _finish(
        total, n, x_rows, pair, there, expert, tile, factor, bias, out, out_stride, outputs,
        FACTOR, BIASED, ACTIVATION, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "pairs"])
def _dense(  # type: ignore[no-untyped-def]
    x,
    factor,
    order,
    rows,
    block_experts,
    bias,
    out,
    weight,
    x_stride,
    out_stride,
    blocks,
    pairs,
    outputs,
    columns,
    DIVISOR: tl.constexpr,
    FACTOR: tl.constexpr,
    ORDERED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Plain matrices (experts, outputs, columns). WIDE: of two types, that are multiplied as float32."""
    block, tile = place(blocks, tl.cdiv(outputs, BLOCK_N), BAND)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
    there = pair < pairs
    x_rows = tl.where(there, pair // DIVISOR, 0).to(tl.int64)
    n = _outputs(tile, outputs, BLOCK_N, ACTIVATION >= 0)
    x += x_rows[:, None] * x_stride
    weight += expert * outputs * columns + n[:, None] * columns
    if ORDERED:
        order += expert * columns
    DTYPE: tl.constexpr = tl.float32 if WIDE else weight.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, columns, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        source = column
        if ORDERED:
            source = tl.load(order + tl.minimum(column, columns - 1))
        if EVEN:
            seen = tl.load(x + source[None, :])
            w = tl.load(weight + column[None, :])
        else:
            mask = (column < columns)[None, :]
            seen = tl.load(x + source[None, :], mask=mask, other=0.0)
            w = tl.load(weight + column[None, :], mask=mask, other=0.0)
        total = dot(w.to(DTYPE), tl.trans(seen.to(DTYPE)), total)
    _finish(
        total, n, x_rows, pair, there, expert, tile, factor, bias, out, out_stride, outputs,
        FACTOR, BIASED, ACTIVATION, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """How a launch is cut: BLOCK_N outputs a program, its warps, and the stages of its loads."""

    n: int
    warps: int
    stages: int


# By rows of a block. Few rows are bound by reading weights: many small programs, deep in loads. From 64
# rows on the tensor cores are the bound: tiles whose operands are read often enough from shared memory and
# the L2 cache (64 * 128 needs 1/43 byte a multiplication, 128 * 128 1/64), sums within 64 registers a
# thread, and as many again where scales meet the sums of a part. Steps of more than two such parts, or of
# tables in two numbers, have to keep still more, and get half the outputs. float32 has no tensor cores, and
# operands twice as large. By reasoning, and by what the compiler says of registers: none of it has been
# timed on a GPU.
BLOCKS = {16: Blocks(64, 4, 4), 32: Blocks(64, 4, 4), 64: Blocks(128, 8, 3), 128: Blocks(128, 8, 3)}
FLOAT_BLOCKS = {16: Blocks(64, 4, 2), 32: Blocks(64, 4, 2)}
BAND = 8  # blocks of rows that go through all outputs together
BLOCK_K = 64  # columns of a step of plain matrices
MOST_STAGED = 96 << 10  # bytes of x and weight that all stages of a program may hold


def block_rows(pairs: int, experts: int, dtype: torch.dtype, most: int) -> int:
    """BLOCK_M: twice the rows an expert gets on average, so that most experts are read once."""
    rows = min(2 * pairs / experts, most)
    sizes = _sizes(dtype)
    return next((size for size in sizes if size >= rows), max(sizes))


def _sizes(dtype: torch.dtype) -> dict[int, Blocks]:
    return FLOAT_BLOCKS if dtype is torch.float32 else BLOCKS


def multiply(
    stack: Stack, given: Rows, sorted_: SortedPairs, bias: Tensor | None, activation: str | None, out: Tensor
) -> None:
    """out (pairs, outputs) of every pair: its row of x by its expert's matrix, times factor, plus bias.

    With an activation the matrix is gated and ``out`` (pairs, outputs / 2). ``bias``: float32 (experts,
    outputs).
    """
    (outputs, columns), x = stack.shape, given.x
    blocks = _sizes(x.dtype)[sorted_.block_m]
    assert x.stride(1) == 1 and out.stride(1) == 1 and x.shape[1] == columns
    assert bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.shape[1] == outputs)
    number = -1 if activation is None else activation_number(activation)
    factor = given.factor
    constants: dict[str, object] = {
        "DIVISOR": given.divisor,
        "FACTOR": "" if factor is None else "one" if factor.numel() == 1 else "row",
        "ORDERED": stack.order is not None,
        "BIASED": bias is not None,
        "ACTIVATION": number,
        "BAND": BAND,
        "BLOCK_M": sorted_.block_m,
    }
    numbers = (x.stride(0), out.stride(0), sorted_.blocks, sorted_.pairs, outputs, columns)
    if stack.layout is None:
        weight = stack.buffers["matrix"]
        assert given.scales is None, "plain matrices meet no codes"
        narrow = weight.dtype is x.dtype and weight.dtype is not torch.float32
        if not narrow:
            blocks = Blocks(32, blocks.warps, 2)
        runtime.launch(
            _dense,
            (sorted_.blocks * triton.cdiv(outputs, blocks.n),),
            *(x, factor, stack.order, sorted_.rows, sorted_.experts, bias, out, weight),
            *numbers,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            WIDE=not narrow,
            BLOCK_N=blocks.n,
            EVEN=columns % BLOCK_K == 0,
            BLOCK_K=BLOCK_K if narrow else BLOCK_K // 2,
            **constants,
        )
        return
    layout, scales = stack.layout, given.scales
    every, runs = _steps(layout, given.group)
    if every == "tile" and (stack.split or runs * layout.fields > 2):
        blocks = replace(blocks, n=64)
    step = runs * layout.fields * layout.tile
    staged = step * (sorted_.block_m * x.element_size() + blocks.n * layout.bits // 8)
    sizes = {name: buffer[0].numel() for name, buffer in stack.buffers.items()}
    runtime.launch(
        _packed,
        (sorted_.blocks * triton.cdiv(outputs, blocks.n),),
        *(x, factor, scales, stack.order, sorted_.rows, sorted_.experts, bias, out),
        *arguments(stack.buffers),
        numbers[0],
        *((0, 0) if scales is None else scales.stride()),
        *numbers[1:],
        *(sizes.get(name, 0) for name in ("plane4", "plane2", "plane1", "codes", "scale0", "scale1")),
        num_warps=blocks.warps,
        num_stages=max(min(blocks.stages, MOST_STAGED // staged), 1),
        GROUP=given.group,
        EVERY=every,
        SPLIT=stack.split,
        EVEN=columns % step == 0,
        RUNS=runs,
        BLOCK_N=blocks.n,
        **constants,
        **layout.constants,
    )


def _steps(layout: Layout, group: int) -> tuple[str, int]:
    """What shares a scale (EVERY of the kernel) and how many runs a step has."""
    columns = layout.shape[1]
    groups = [level.columns for level in layout.levels if level.columns] + [group] * (group > 0)
    sums = layout.offset or layout.zero == "float"
    run = layout.fields * layout.tile
    runs = 2 if run < 128 and layout.runs % 2 == 0 else 1
    if layout.flat:
        return "tile", runs
    if not groups and not sums:
        return "end", runs
    span = gcd(*groups) if groups else columns
    for count in (runs, 1):
        if span % (count * run) == 0:
            return "step", count
    return "tile", runs
