"""LLM.int8's inputs on the GPU: int8 codes beside outlier columns, which are found there and stay there.

    y[m, n] = (sum of code[m, k] w[n, k] * scale[m]  +  sum over outlier columns k of x[m, k] w[n, k])
              * w scale[n] + bias[n]

``numerics.llm_int8`` has the rule. Two launches for x: ``find`` gives each row's largest |x| below the
threshold and marks the columns in which a row that is finite has a larger one; ``quantize`` makes codes, zero
in marked columns, and one program more lists these in ascending order, so that sums have one order and a
product reads nothing but them. How many there are only the device knows. The product (``eight_bit``) goes on
from the whole numbers' sum with the listed columns, 32 at a time, in x's own type, in which int8 codes are
exact: x is multiplied as it is, where the definition divides it by the token's scale and multiplies that
again. None of it has run on a GPU yet.

Where columns of a row lie on several ranks, a row may not be finite because of what another rank has of it.
There ``see`` takes the place of ``find``, the ranks tell each other what it saw, and ``mark`` does the rest:
a launch more, and columns are listed and multiplied where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.input_codes import code_steps, code_value, columns_of, scale_of, size_of
from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.parallel import Parallel

_MOST_BLOCK = 4096  # columns of a row that are read at a time; the second reading comes from the cache
TOGETHER = tl.constexpr(32)  # outlier columns of one step of a product


@dataclass(frozen=True)
class Outliers:
    """Columns of x (tokens, columns) that are multiplied as they are.

    ``columns``: int32 (columns,), the first ``count``, int32 (1,), of which are their numbers, rising.
    """

    x: Tensor
    columns: Tensor
    count: Tensor


@triton.jit
def _peaks_of(  # type: ignore[no-untyped-def]
    x, columns, threshold, BF16: tl.constexpr, BLOCK: tl.constexpr
):
    """int32 bits of a row's largest |x|, and of the largest below the threshold; NaN is larger than all."""
    top = tl.zeros((BLOCK,), tl.int32)
    inner = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = columns_of(x, None, column, columns, BF16)
        top = tl.maximum(top, size_of(value))
        inner = tl.maximum(inner, tl.where(tl.abs(value) >= threshold, 0, size_of(value)))
    return tl.max(top, 0), tl.max(inner, 0)


@triton.jit
def _take_row(  # type: ignore[no-untyped-def]
    x, top, inner, peaks, marks, columns, threshold, BF16: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's peak, and the columns that it makes outliers. ``top``, ``inner``: ``_peaks_of`` its whole."""
    finite = top < 0x7F800000
    tl.store(peaks, inner | tl.where(finite, 0, -0x80000000))
    if finite & (top.to(tl.float32, bitcast=True) >= threshold):
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = columns_of(x, None, column, columns, BF16)
            outlier = (column < columns) & (tl.abs(value) >= threshold)
            tl.store(marks + column, tl.full((BLOCK,), 1, tl.int8), mask=outlier)


@triton.jit
def find(  # type: ignore[no-untyped-def]
    x,
    peaks,  # int32 (rows,): bits of the largest |x| below the threshold, with a sign if the row is not finite
    marks,  # int8 (columns,), zeros
    columns,
    stride,
    threshold,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    top, inner = _peaks_of(x, columns, threshold, BF16, BLOCK)
    _take_row(x, top, inner, peaks + row, marks, columns, threshold, BF16, BLOCK)


@triton.jit
def see(  # type: ignore[no-untyped-def]
    x,
    seen,  # float32 (rows, 2): the largest |x|, and the largest below the threshold
    columns,
    stride,
    threshold,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What one rank sees of each row."""
    row = tl.program_id(0).to(tl.int64)
    top, inner = _peaks_of(x + row * stride, columns, threshold, BF16, BLOCK)
    tl.store(seen + 2 * row, top.to(tl.float32, bitcast=True))
    tl.store(seen + 2 * row + 1, inner.to(tl.float32, bitcast=True))


@triton.jit
def mark(  # type: ignore[no-untyped-def]
    x,
    seen,  # of all ranks
    peaks,  # as of ``find``
    marks,
    columns,
    stride,
    threshold,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What follows on one rank from what all of them saw."""
    row = tl.program_id(0).to(tl.int64)
    top, inner = size_of(tl.load(seen + 2 * row)), size_of(tl.load(seen + 2 * row + 1))
    _take_row(x + row * stride, top, inner, peaks + row, marks, columns, threshold, BF16, BLOCK)


@triton.jit(do_not_specialize=["rows"])
def quantize(  # type: ignore[no-untyped-def]
    x,
    peaks,
    marks,
    out,  # int8 codes, or values of any float type
    scales,  # float32 (rows,)
    listed,  # int32 (columns,)
    count,  # int32 (1,)
    rows,
    columns,
    stride,
    out_stride,
    limit,
    floor,
    BF16: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    RAW: tl.constexpr,  # codes, whose scales say NaN; else what ``InputTransform`` gives
    WHOLE: tl.constexpr,  # values of all columns, over no scale
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row == rows:
        before = tl.full((), 0, tl.int32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            marked = tl.load(marks + column, mask=column < columns, other=0).to(tl.int32)
            place = before + tl.cumsum(marked, 0) - marked
            tl.store(listed + place, column, mask=marked != 0)
            before += tl.sum(marked, 0)
        tl.store(count, before)
    else:
        peak = tl.load(peaks + row)
        finite = peak >= 0
        amax = (peak & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        scale = scale_of(amax, limit, floor, float("inf"), 0.0, 0, "f32")
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = columns_of(x + row * stride, None, column, columns, BF16)
            marked = tl.load(marks + column, mask=column < columns, other=0) != 0
            steps = code_steps(value, scale, RECIPROCAL)
            code = code_value(steps, -128.0, 127.0, 0, 0)
            place = out + row * out_stride + column
            if RAW:
                code = tl.where(finite & (~marked), code, 0.0)
                tl.store(place, code.to(tl.int32).to(tl.int8), mask=column < columns)
            else:
                made = tl.where(marked, value if WHOLE else steps, code * scale if WHOLE else code)
                made = tl.where(finite, made, float("nan"))
                tl.store(place, cast(made, out.dtype.element_ty), mask=column < columns)
        if RAW:
            scale = tl.where(finite, scale, float("nan"))
        tl.store(scales + row, scale)


@triton.jit
def add_columns(  # type: ignore[no-untyped-def]
    y,  # float32 (BLOCK_M, BLOCK_N)
    x,
    x_stride,
    w,  # int8 codes
    listed,
    count,
    near_m,
    near_n,
    columns,
    TOGETHER: tl.constexpr,
):
    """y and the products of the listed columns of x's rows and w's, in their order."""
    for start in range(0, count, TOGETHER):
        place = start + tl.arange(0, TOGETHER)
        column = tl.load(listed + place, mask=place < count, other=0).to(tl.int64)
        seen = tl.load(
            x + near_m.to(tl.int64)[:, None] * x_stride + column[None, :],
            mask=(place < count)[None, :],
            other=0.0,
        )
        codes = tl.load(
            w + near_n.to(tl.int64)[None, :] * columns + column[:, None],
            mask=(place < count)[:, None],
            other=0,
        )
        y = dot(seen, cast(codes.to(tl.float32), x.dtype.element_ty), y)
    return y


def _found(x: Tensor, threshold: float, bf16: bool, across: Parallel) -> tuple[Tensor, Tensor]:
    """Of x (rows, columns), some of whose columns are here: ``find``'s peaks and marks."""
    rows, columns = x.shape
    peaks = torch.empty(rows, dtype=torch.int32, device=x.device)
    marks = torch.zeros(columns, dtype=torch.int8, device=x.device)
    block, warps = _block(columns)
    lies = (columns, x.stride(0), threshold)
    if across.size == 1:
        runtime.launch(find, (rows,), x, peaks, marks, *lies, num_warps=warps, BF16=bf16, BLOCK=block)
        return peaks, marks
    seen = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    runtime.launch(see, (rows,), x, seen, *lies, num_warps=warps, BF16=bf16, BLOCK=block)
    seen = across.largest(seen)
    runtime.launch(mark, (rows,), x, seen, peaks, marks, *lies, num_warps=warps, BF16=bf16, BLOCK=block)
    return peaks, marks


def quantized(
    x: Tensor,
    out: Tensor,
    numbers: dict[str, float],
    constants: dict[str, bool],
    threshold: float,
    across: Parallel,
    *,
    raw: bool = False,
    whole: bool = False,
) -> tuple[Tensor, Outliers]:
    """Into ``out`` codes, or what ``InputTransform`` gives (``whole``: of x with its scales); float32 (rows,)
    scales, and the columns that are not rounded. ``across``: the ranks that x's columns lie on."""
    rows, columns = x.shape
    peaks, marks = _found(x, threshold, constants["BF16"], across)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    listed = torch.empty(columns, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    block, warps = _block(columns)
    runtime.launch(
        quantize,
        (rows + 1,),
        *(x, peaks, marks, out, scales, listed, count, rows, columns, x.stride(0), out.stride(0)),
        *(numbers["limit"], numbers["floor"]),
        num_warps=warps,
        RAW=raw,
        WHOLE=whole,
        BLOCK=block,
        **{name: constants[name] for name in ("BF16", "RECIPROCAL")},
    )
    return scales, Outliers(x, listed, count)


def _block(columns: int) -> tuple[int, int]:
    """Columns read at a time, and warps."""
    block = min(triton.next_power_of_2(columns), _MOST_BLOCK)
    return block, 4 if block <= 1024 else 8
