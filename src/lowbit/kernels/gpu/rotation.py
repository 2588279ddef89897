"""Rotations of activations on the GPU: ``numerics.rotation.Rotation`` as products on tensor cores.

A Hadamard matrix of Sylvester's order is a Kronecker product of smaller ones, H(a b) = H(a) x H(b): a block
of a b columns, laid out as a matrix (a, b), becomes H(a) X H(b). Up to 128 columns are one product with the
matrix itself, up to 8,192 two of 16 to 128. Larger ones, up to 65,536, are two passes: H(b) over rows of b
columns, float32 results, and H(a) across these. The entries are 1 and -1, exact in every type, so only x has
to be: what bfloat16 or float16 does not hold is the sum of three bfloat16 numbers, 24 bits, and three
products. A product with any other matrix takes six, or three where x is bfloat16: what is left out is below
2^-24 of |x| |R|.

So a result is the definition's in another order of float32 sums: it differs by a few 2^-24 of the block's sum
of |x| over the divisor, times the largest of ``after``. Infinity becomes NaN. A block sees no other block.

How work is cut. A product of up to 128 columns takes 16 blocks a program, and 64 once that leaves enough
programs for every multiprocessor to have many: more rows would wait for the matrix as often and hold more
registers. With two factors a block is a program, of a warp for each 1,024 numbers; across blocks a program
has 64 columns of each of 64. Where codes are made of what was rotated, ``input_codes`` rotates a program's
numbers by the functions of this module. Other matrices are read in steps of 32 rows. A number costs at most
2 * 128 operations for each of three parts, which tensor cores do while memory moves it. Givens rotations are
no products (``givens``). **None of it has run on a GPU yet**: it is proven in Triton's interpreter, and
compiled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import givens, runtime
from lowbit.kernels.gpu.language import cast, dot
from lowbit.numerics.rotation import Rotation, sylvester

LARGEST = 65536  # of a Hadamard matrix
IN_A_PROGRAM = 8192  # registers hold no larger block
FACTOR = 128  # the largest one
_ACROSS = 64  # blocks that the second pass adds up, and columns of each that a program has
TILE = 16  # the least side of a product
_MANY = 4096  # programs of 16 blocks from which 64 go together
_WHOLE = 128  # columns of another matrix that a program has, so that x may be overwritten
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _parts(x):  # type: ignore[no-untyped-def]
    """float32 x as the sum of three bfloat16 numbers, the largest first."""
    high = cast(x, tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = cast(rest, tl.bfloat16)
    return high, middle, cast(rest - middle.to(tl.float32), tl.bfloat16)


@triton.jit
def _signs(table, N: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(N, N) of 1 and -1 from the table's first rows and columns; blocks of ``SIZE`` and zeros where less."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    if SIZE < N:
        same = row // SIZE == column // SIZE
        return tl.load(table + row % SIZE * STRIDE + column % SIZE, mask=same, other=0)
    return tl.load(table + row * STRIDE + column)


@triton.jit
def by_signs(x, signs, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """x @ signs in float32. ``HALF``: "bf16" or "fp16", which hold x exactly; "": neither does."""
    total = tl.zeros(x.shape, tl.float32)
    if HALF == "fp16":
        return dot(x.to(tl.float16), signs.to(tl.float16), total)
    signs = cast(signs.to(tl.float32), tl.bfloat16)
    if HALF == "bf16":
        return dot(cast(x.to(tl.float32), tl.bfloat16), signs, total)
    high, middle, low = _parts(x.to(tl.float32))
    return dot(high, signs, dot(middle, signs, dot(low, signs, total)))


@triton.jit
def _from_the_left(signs, x):  # type: ignore[no-untyped-def]
    """signs @ x in float32, of float32 x."""
    high, middle, low = _parts(x)
    left = cast(signs.to(tl.float32), tl.bfloat16)
    total = dot(left, low, tl.zeros(x.shape, tl.float32))
    return dot(left, high, dot(left, middle, total))


@triton.jit
def over(total, divisor):  # type: ignore[no-untyped-def]
    """total / divisor, rounded as the definition rounds it."""
    return tl.div_rn(total, tl.full(total.shape, divisor, tl.float32))


@triton.jit
def turned(  # type: ignore[no-untyped-def]
    values,  # (M, N): M blocks, or N // SIZE times as many
    before,  # float32 (SIZE,), or None for ones
    after,
    table,
    divisor,
    HALF: tl.constexpr,  # what holds values times ``before`` (``by_signs``)
    SIZE: tl.constexpr,
    N: tl.constexpr,  # SIZE, at least 16
    STRIDE: tl.constexpr,
):
    """float32 (M, N), rotated by one product."""
    place = tl.arange(0, N) % SIZE
    if before is not None:
        values = values.to(tl.float32) * tl.load(before + place)[None, :]
    total = over(by_signs(values, _signs(table, N, SIZE, STRIDE), HALF), divisor)
    if after is not None:
        total *= tl.load(after + place)[None, :]
    return total


@triton.jit
def turned_in_two(  # type: ignore[no-untyped-def]
    values,  # (A, B): a block of A * B columns
    place,  # where they stand in ``before`` and ``after``
    before,
    after,
    table,
    divisor,
    HALF: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """float32 (A, B), rotated between two Hadamard matrices."""
    if before is not None:
        values = values.to(tl.float32) * tl.load(before + place)
    inner = by_signs(values, _signs(table, B, B, STRIDE), HALF)
    total = over(_from_the_left(_signs(table, A, A, STRIDE), inner), divisor)
    if after is not None:
        total *= tl.load(after + place)
    return total


@triton.jit(do_not_specialize=["units"])
def hadamard(  # type: ignore[no-untyped-def]
    x,  # (rows, width)
    x_row,
    out,  # (rows, width), may be x
    out_row,
    before,
    after,
    table,  # int8, STRIDE columns
    units,  # blocks of N columns in all
    each,  # in a row
    width,
    divisor,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """M blocks of a program by the whole matrix."""
    unit = tl.program_id(0) * M + tl.arange(0, M)
    column = (unit % each * N)[:, None] + tl.arange(0, N)[None, :]
    inside = (unit < units)[:, None] & (column < width)
    row = (unit // each).to(tl.int64)[:, None]
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    total = turned(values, before, after, table, divisor, HALF, SIZE, N, STRIDE)
    tl.debug_barrier()  # where out is x all of it has been read
    tl.store(out + row * out_row + column, cast(total, out.dtype.element_ty), mask=inside)


@triton.jit
def hadamard_in_two(  # type: ignore[no-untyped-def]
    x,
    x_row,
    out,
    out_row,
    before,  # float32 (PARTS * A * B,)
    after,
    table,
    each,
    divisor,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of a larger matrix
    A: tl.constexpr,
    B: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """A block of A * B columns, as a matrix (A, B), between two Hadamard matrices."""
    unit = tl.program_id(0)
    place = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    row = (unit // each).to(tl.int64)
    column = unit % each * (A * B) + place
    values = tl.load(x + row * x_row + column)
    place += unit % each % PARTS * (A * B)
    total = turned_in_two(values, place, before, after, table, divisor, HALF, A, B, STRIDE)
    tl.debug_barrier()
    tl.store(out + row * out_row + column, cast(total, out.dtype.element_ty))


@triton.jit
def hadamard_across(  # type: ignore[no-untyped-def]
    x,  # float32: blocks of B columns, rotated
    x_row,
    out,
    out_row,
    after,  # float32 (A * B,)
    table,
    each,  # blocks of A * B columns in a row
    divisor,
    A: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """The Hadamard matrix of A across as many blocks, for N columns of each."""
    unit = tl.program_id(0)
    place = tl.arange(0, A)[:, None] * B + tl.program_id(1) * N + tl.arange(0, N)[None, :]
    row = (unit // each).to(tl.int64)
    column = unit % each * (A * B) + place
    total = over(_from_the_left(_signs(table, A, A, STRIDE), tl.load(x + row * x_row + column)), divisor)
    if after is not None:
        total *= tl.load(after + place)
    tl.store(out + row * out_row + column, cast(total, out.dtype.element_ty))


@triton.jit(do_not_specialize=["units"])
def product(  # type: ignore[no-untyped-def]
    x,
    x_row,
    out,
    out_row,
    matrix,  # float32 (size, size)
    units,
    each,
    size,
    EXACT: tl.constexpr,  # x is bfloat16
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """M blocks times N columns of any matrix."""
    unit = tl.program_id(0) * M + tl.arange(0, M)
    made = tl.program_id(1) * N + tl.arange(0, N)
    there = (unit < units)[:, None]
    first = (unit % each * size)[:, None]
    row = (unit // each).to(tl.int64)[:, None]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, size, K):
        k = start + tl.arange(0, K)
        values = tl.load(x + row * x_row + first + k[None, :], mask=there & (k < size)[None, :], other=0.0)
        place = k.to(tl.int64)[:, None] * size + made[None, :]
        weights = tl.load(matrix + place, mask=(k < size)[:, None] & (made < size)[None, :], other=0.0)
        high, middle, low = _parts(weights)
        if EXACT:
            total = dot(values, high, dot(values, middle, dot(values, low, total)))
        else:
            x_high, x_middle, x_low = _parts(values.to(tl.float32))
            total = dot(x_low, high, dot(x_middle, middle, dot(x_high, low, total)))
            total = dot(x_high, high, dot(x_middle, high, dot(x_high, middle, total)))
    tl.debug_barrier()
    inside = there & (made < size)[None, :]
    tl.store(out + row * out_row + first + made[None, :], cast(total, out.dtype.element_ty), mask=inside)


@cache
def table(device: torch.device) -> Tensor:
    """int8 (128, 128): the Hadamard matrix, whose corner is every smaller one."""
    return sylvester(FACTOR, device)


def takes(rotation: Rotation, x: Tensor, out: Tensor) -> bool:
    """Whether these kernels have it: rows (rows, width) whose numbers lie one behind another."""
    if not all(t.dim() == 2 and t.stride(1) == 1 and t.dtype in _TYPES for t in (x, out)):
        return False
    if rotation.partners is not None:
        return givens.takes(rotation)
    tensors = (rotation.before, rotation.after, rotation.matrix)
    return (
        (rotation.matrix is not None or rotation.size <= LARGEST)
        and not rotation.wide
        and all(t is None or t.is_contiguous() for t in tensors)
    )


def rotate(rotation: Rotation, x: Tensor, out: Tensor, signs: bool) -> None:
    """x (rows, width) -> out, which may be x. ``signs``: ``rotation.before`` is None or of 1 and -1."""
    rows, width = x.shape
    size = rotation.size
    assert width % size == 0, f"blocks of {size} columns do not fill {width}"
    if not x.numel():
        return
    if rotation.partners is not None:
        givens.rotate(rotation, x, out)
        return
    if rotation.matrix is not None:
        _multiply(rotation.matrix, x, out)
        return
    half = half_of(x.dtype, signs)
    ends = (x, x.stride(0), out, out.stride(0), rotation.before, rotation.after, table(x.device))
    if size > IN_A_PROGRAM:
        _in_two_passes(rotation, x, out, half)
        return
    if size > FACTOR:
        _in_two(ends, rows, width // size, float(rotation.divisor), half, size, 1)
        return
    columns = max(size, TILE)
    each = triton.cdiv(width, columns)
    units = rows * each
    together, warps = _together(units, columns)
    runtime.launch(
        hadamard,
        (triton.cdiv(units, together),),
        *(*ends, units, each, width, float(rotation.divisor)),
        num_warps=warps,
        HALF=half,
        SIZE=size,
        M=together,
        N=columns,
        STRIDE=FACTOR,
    )


def half_of(dtype: torch.dtype, signs: bool) -> str:
    """The 16-bit type that holds x of ``dtype`` before its first product."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "") if signs else ""


def factors(size: int) -> tuple[int, int]:
    """A and B of ``turned_in_two``."""
    power = size.bit_length() - 1
    return 1 << power - power // 2, 1 << power // 2


def _in_two(
    ends: tuple[Any, ...], rows: int, each: int, divisor: float, half: str, size: int, parts: int
) -> None:
    """Rows of ``each`` blocks of ``size`` columns, ``parts`` of which have their own of ``before``."""
    a, b = factors(size)
    runtime.launch(
        hadamard_in_two,
        (rows * each,),
        *(*ends, each, divisor),
        num_warps=max(size // 1024, 1),
        HALF=half,
        PARTS=parts,
        A=a,
        B=b,
        STRIDE=FACTOR,
    )


def _in_two_passes(rotation: Rotation, x: Tensor, out: Tensor, half: str) -> None:
    rows, width = x.shape
    inner = rotation.size // _ACROSS
    made = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    ends = (x, x.stride(0), made, width, rotation.before, None, table(x.device))
    _in_two(ends, rows, width // inner, 1.0, half, inner, _ACROSS)
    each = width // rotation.size
    runtime.launch(
        hadamard_across,
        (rows * each, inner // _ACROSS),
        *(made, width, out, out.stride(0), rotation.after, table(x.device), each, float(rotation.divisor)),
        num_warps=4,
        A=_ACROSS,
        B=inner,
        N=_ACROSS,
        STRIDE=FACTOR,
    )


def _together(units: int, columns: int) -> tuple[int, int]:
    """Blocks of a program, and its warps."""
    if units < TILE * _MANY:
        return TILE, max(columns // 32, 1)
    return 64, 4


def _multiply(matrix: Tensor, x: Tensor, out: Tensor) -> None:
    size = len(matrix)
    rows, width = x.shape
    each = width // size
    units = rows * each
    together, warps = (64, 8) if units >= 64 * 132 else (TILE, 4)
    columns = min(max(triton.next_power_of_2(size), TILE), _WHOLE)
    # A program that does not have all columns of a block would overwrite what others read.
    made = torch.empty_like(out) if size > columns and out.data_ptr() == x.data_ptr() else out
    runtime.launch(
        product,
        (triton.cdiv(units, together), triton.cdiv(size, columns)),
        *(x, x.stride(0), made, made.stride(0), matrix, units, each, size),
        num_warps=warps,
        EXACT=x.dtype is torch.bfloat16,
        M=together,
        N=columns,
        K=32,
    )
    if made is not out:
        out.copy_(made)
