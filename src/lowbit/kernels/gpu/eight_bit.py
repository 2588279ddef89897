"""Products of 8-bit inputs and 8-bit weights on tensor cores: int8 by int8, 8-bit floats by 8-bit floats.

    y[m, n] = sum over k of (x[m, k] - zero[m]) * w[n, k]  *  x scale[m] * w scale[n]  + bias[n]

Whole numbers are summed in int32, exactly, so their results have the same bits for any number of rows and
any tile. A zero point of the input is taken out of the sum: zero[m] times the sum of the weight's row, which
is known from loading. Where groups of columns have scales of their own, on either side, a tile's product over
one group is scaled in float32 before it is added: DeepSeek-V3's fp8 with weights in blocks of 128 x 128 and
inputs in groups of 128 is this. Scales that cover all columns wait for the end.

LLM.int8's outlier columns are added to the whole numbers' scaled sum in x's own type (``outlier_columns``);
of split columns the last part has them. The vendor's product knows nothing of them.

8-bit floats meet in fp8 tensor cores where there are any (compute capability 8.9 and later). Their sums there
keep fewer bits than float32 has, so every 128 columns are summed from zero and added in float32. On Ampere
the tiles become float16 (both formats are exact in it, and so are the products in the float32 sum).

Few rows: the columns are cut in parts (split-K), so that every multiprocessor has something to read, and
``_finish`` adds the parts in their order: no atomics, the same bits every time. Many rows: tiles of 128 x 128
bytes, 8 warps, or the vendor's own product where it is offered (``_by_library``). How blocks were chosen:

- BLOCK_K is 128 bytes, a whole cache line of both operands a row, or the group's size if that is less; 64
  where codes become float16 in registers.
- Up to 16 rows time is that of reading the weight: a program reads 64 of its rows, 8 KiB a step with five
  steps under way, 40 KiB for a multiprocessor that needs about 32 (3 TB/s times 1 us over 132 of them).
- From 128 rows on it is that of the products: at 128 x 128 a byte that is loaded is used 128 times. The sums
  are 64 registers a thread, and where a second sum is made for each step another 64. Three steps of 32 KiB
  fit the shared memory of every device (99 KiB on consumer cards).
- A gate and its partner have half as many rows each. Rows that are no multiple of 16 bytes are read byte by
  byte, of which a thread can hold few: small tiles for them.

None of it has run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.elementwise import activation_number
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.activation_quant import Codes
from lowbit.kernels.gpu.elementwise import activate, gated_activation
from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.gpu.outlier_columns import TOGETHER, add_columns

# Columns of whole numbers whose sums, less a zero point's, stay below 2^31: 255 * 128 * 2^16.
MOST_WHOLE_COLUMNS = 1 << 16
LEAST_GROUP = 64  # below, scaling takes longer than the product: values in bfloat16 are as fast
_LIBRARY_ROWS = 256  # from here on the vendor's tiles, tuned for each device, are asked
_FINISH_BLOCK = 1024
# (most rows of x, BLOCK_M, BLOCK_N, warps, stages): the module docstring has the reasons.
_TILES = ((16, 16, 64, 4, 5), (32, 32, 64, 4, 5), (64, 64, 64, 4, 4), (128, 64, 128, 4, 4))
_LARGE_TILE = (128, 128, 8, 3)
_ODD_TILE = (32, 32, 4, 2)


def _tile(tokens: int, columns: int, as_stored: bool, gated: bool) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. ``as_stored``: the tensor cores take the codes themselves."""
    found = next((tile for most, *tile in _TILES if tokens <= most), list(_LARGE_TILE))
    block_k = 128 if as_stored else 64
    if columns % 16:
        found, block_k = list(_ODD_TILE), 64
    block_m, block_n, warps, stages = found
    return block_m, block_n // 2 if gated else block_n, block_k, warps, stages


@triton.jit
def operand(codes, FORMAT: tl.constexpr, FP8_DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of codes as the tensor cores take it."""
    if FORMAT == "int8":
        taken = codes
    elif FP8_DOT:
        if FORMAT == "e5m2":
            taken = codes.to(tl.float8e5, bitcast=True)
        else:
            taken = codes.to(tl.float8e4nv, bitcast=True)
    elif FORMAT == "e5m2":
        taken = (codes.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    else:
        wide = codes.to(tl.int16)
        half = (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
        taken = tl.where((wide & 0x7F) == 0x7F, float("nan"), half)
    return taken


@triton.jit
def numbers(pointers, k, columns, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of codes, zeros behind the last column."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=k < columns, other=0)


@triton.jit
def _by_tokens(  # type: ignore[no-untyped-def]
    total,  # (BLOCK_M, BLOCK_N): whole numbers or floats
    m,
    n,
    there_m,
    there_n,
    x_scale,
    x_zero,
    w_sum,
    X_GROUP: tl.constexpr,
    ZERO: tl.constexpr,
):
    """float32 sums of a tile's columns n with what x's zero points and scales do to them."""
    if ZERO:
        zero = tl.load(x_zero + m, mask=there_m, other=0)
        total -= zero[:, None] * tl.load(w_sum + n, mask=there_n, other=0)[None, :]
    y = total.to(tl.float32)
    if X_GROUP == 0:
        y *= tl.load(x_scale + m, mask=there_m, other=0.0)[:, None]
    return y


@triton.jit
def _by_rows(  # type: ignore[no-untyped-def]
    y, n, there_n, w_scale, bias, W_GROUP: tl.constexpr, BIAS: tl.constexpr
):
    """And what the scales of the weight's rows n and their bias do."""
    if W_GROUP == 0:
        y *= tl.load(w_scale + n, mask=there_n, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=there_n, other=0.0)[None, :]
    return y


@triton.jit(do_not_specialize=["tokens"])
def _multiply(  # type: ignore[no-untyped-def]
    x,  # (tokens, columns) codes
    w,  # (width, columns) codes, or (2 * width, columns): the gate's rows, then its partners'
    x_scale,  # float32 (tokens,) or (groups, tokens)
    x_zero,  # int32 (tokens,)
    w_scale,  # float32 (rows of w,) or (blocks of rows, groups)
    w_sum,  # int32 (rows of w,)
    bias,  # float32 (rows of w,)
    outlier_x,  # (tokens, columns): ``outlier_columns``
    listed,
    count,
    beside,  # float32 (tokens, width): their products, where the columns are split
    out,  # (tokens, width), or the parts (SPLITS, tokens, width)
    outlier_stride,
    tokens,
    width,
    columns,
    out_stride,
    w_groups,
    w_rows,  # rows of a block that shares a scale
    X_FORMAT: tl.constexpr,
    W_FORMAT: tl.constexpr,
    FP8_DOT: tl.constexpr,
    X_GROUP: tl.constexpr,  # columns that share a scale; 0: all
    W_GROUP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # rows of a tile lie in one block of scales
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # -1: none
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run at one time share rows of x and w: eight tiles down, then one to the right.
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    number = tl.program_id(0)
    first = number // (8 * tiles_n) * 8
    tall = tl.minimum(tiles_m - first, 8)
    tile_m = first + number % (8 * tiles_n) % tall
    tile_n = number % (8 * tiles_n) // tall

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there_m, there_n = m < tokens, n < width
    near_m = tl.where(there_m, m, 0)  # rows outside read the first, and are not stored
    near_n = tl.where(there_n, n, 0)
    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(columns, BLOCK_K)
    part = tl.cdiv(blocks, SPLITS)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, blocks)

    x_tile = x + near_m.to(tl.int64)[:, None] * columns + (begin * BLOCK_K + k)[None, :]
    w_tile = w + near_n.to(tl.int64)[None, :] * columns + (begin * BLOCK_K + k)[:, None]
    partner_tile = w + (near_n.to(tl.int64) + width)[None, :] * columns + (begin * BLOCK_K + k)[:, None]
    WHOLE: tl.constexpr = X_FORMAT == "int8" and X_GROUP == 0 and W_GROUP == 0
    if ONE_BLOCK:
        w_block = w_scale + (tile_n * BLOCK_N // w_rows) * w_groups
        partner_block = w_scale + ((tile_n * BLOCK_N + width) // w_rows) * w_groups
    else:
        w_block = w_scale + (near_n // w_rows)[None, :] * w_groups
        partner_block = w_scale + ((near_n + width) // w_rows)[None, :] * w_groups

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if WHOLE else tl.float32)
    if ACTIVATION >= 0:
        partner_total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if WHOLE else tl.float32)
    for block in range(begin, end):
        left = columns - block * BLOCK_K
        a = operand(numbers(x_tile, k[None, :], left, EVEN), X_FORMAT, FP8_DOT)
        b = operand(numbers(w_tile, k[:, None], left, EVEN), W_FORMAT, FP8_DOT)
        if ACTIVATION >= 0:
            c = operand(numbers(partner_tile, k[:, None], left, EVEN), W_FORMAT, FP8_DOT)
        if WHOLE or (X_GROUP == 0 and W_GROUP == 0 and not FP8_DOT):
            total = dot(a, b, total)
            if ACTIVATION >= 0:
                partner_total = dot(a, c, partner_total)
        else:
            zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if X_FORMAT == "int8" else tl.float32)
            scale = 1.0
            partner_scale = 1.0
            if W_GROUP != 0:
                group = block * BLOCK_K // W_GROUP
                scale = tl.load(w_block + group)
                if ACTIVATION >= 0:
                    partner_scale = tl.load(partner_block + group)
            if X_GROUP != 0:
                x_part = tl.load(x_scale + block * BLOCK_K // X_GROUP * tokens + near_m)[:, None]
                scale = x_part * scale
                partner_scale = x_part * partner_scale
            total += dot(a, b, zeros).to(tl.float32) * scale
            if ACTIVATION >= 0:
                partner_total += dot(a, c, zeros).to(tl.float32) * partner_scale
        x_tile += BLOCK_K
        w_tile += BLOCK_K
        partner_tile += BLOCK_K

    there = there_m[:, None] & there_n[None, :]
    if SPLITS > 1:
        place = (tl.program_id(1).to(tl.int64) * tokens + m)[:, None] * width + n[None, :]
        tl.store(out + place, total, mask=there)
        if OUTLIERS:  # noqa: SIM102 (a constant, and what is not)
            if tl.program_id(1) == SPLITS - 1:
                apart = add_columns(
                    tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                    outlier_x, outlier_stride, w, listed, tl.load(count), near_m, near_n, columns, TOGETHER,
                )  # fmt: skip
                tl.store(beside + m.to(tl.int64)[:, None] * width + n[None, :], apart, mask=there)
    else:
        y = _by_tokens(total, m, n, there_m, there_n, x_scale, x_zero, w_sum, X_GROUP, ZERO)
        if OUTLIERS:
            number = tl.load(count)
            y = add_columns(
                y, outlier_x, outlier_stride, w, listed, number, near_m, near_n, columns, TOGETHER
            )
        y = _by_rows(y, n, there_n, w_scale, bias, W_GROUP, BIAS)
        if ACTIVATION >= 0:
            up = _by_tokens(
                partner_total, m, n + width, there_m, there_n, x_scale, x_zero, w_sum, X_GROUP, ZERO
            )
            if OUTLIERS:
                up = add_columns(
                    up,
                    outlier_x,
                    outlier_stride,
                    w,
                    listed,
                    number,
                    near_m,
                    near_n + width,
                    columns,
                    TOGETHER,
                )
            up = _by_rows(up, n + width, there_n, w_scale, bias, W_GROUP, BIAS)
            y = activate(y, up, ACTIVATION)
        place = m.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(out + place, cast(y, out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _finish(  # type: ignore[no-untyped-def]
    parts,  # (SPLITS, tokens, rows of w): whole numbers or floats
    x_scale,
    x_zero,
    w_scale,
    w_sum,
    bias,
    beside,
    out,  # (tokens, width)
    tokens,
    rows,
    width,
    out_stride,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of all parts, in their order, and what a tile of ``_multiply`` does at its end."""
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < width
    there_m = m < tokens
    part = parts + m.to(tl.int64)[:, None] * rows + n[None, :]
    total = tl.load(part, mask=there[None, :], other=0)
    if ACTIVATION >= 0:
        partner_total = tl.load(part + width, mask=there[None, :], other=0)
    for split in range(1, SPLITS):
        part = parts + (m.to(tl.int64) + split * tokens)[:, None] * rows + n[None, :]
        total += tl.load(part, mask=there[None, :], other=0)
        if ACTIVATION >= 0:
            partner_total += tl.load(part + width, mask=there[None, :], other=0)
    apart = m.to(tl.int64)[:, None] * rows + n[None, :]
    y = _by_tokens(total, m, n, there_m, there, x_scale, x_zero, w_sum, X_GROUP, ZERO)
    if OUTLIERS:
        y += tl.load(beside + apart, mask=there[None, :], other=0.0)
    y = _by_rows(y, n, there, w_scale, bias, W_GROUP, BIAS)
    if ACTIVATION >= 0:
        up = _by_tokens(partner_total, m, n + width, there_m, there, x_scale, x_zero, w_sum, X_GROUP, ZERO)
        if OUTLIERS:
            up += tl.load(beside + apart + width, mask=there[None, :], other=0.0)
        up = _by_rows(up, n + width, there, w_scale, bias, W_GROUP, BIAS)
        y = activate(y, up, ACTIVATION)
    place = m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(out + place, cast(y, out.dtype.element_ty), mask=there[None, :])


@dataclass(frozen=True)
class EightBitWeight:
    """A weight as ``multiply`` takes it.

    ``codes``: int8 or an 8-bit float (rows, columns). ``scale``: float32 (rows,), or (blocks of
    ``block_rows`` rows, groups) where groups of ``group`` columns have their own. ``sums``: int32 (rows,),
    each row's codes added up, for inputs with zero points. ``one_scale``: float32 (1,), where it is one.
    """

    codes: Tensor
    scale: Tensor
    group: int = 0
    block_rows: int = 1
    sums: Tensor | None = None
    one_scale: Tensor | None = None


@cache
def _properties(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether there are fp8 tensor cores."""
    if device.type != "cuda":
        return 132, False
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, (found.major, found.minor) >= (8, 9)


def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    return _properties(device)[0]


def fp8_dots(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats as they are."""
    return _properties(device)[1]


def multiply(
    x: Codes,
    x_group: int,
    weight: EightBitWeight,
    bias: Tensor | None,
    narrow_bias: Tensor | None,
    out: Tensor,
    activation: str | None = None,
) -> Tensor:
    """x's codes (tokens, columns), with scales of ``x_group`` columns, times the weight, into ``out``.

    ``bias``: float32 (rows,); ``narrow_bias``: the same as bfloat16, where that is exact. With an activation
    the first half of the rows are its gates: activation(gate) * up.
    """
    tokens, columns = x.codes.shape
    if not tokens:
        return out
    if _by_library(x, x_group, weight, bias, narrow_bias, out, activation):
        return out
    rows, width = len(weight.codes), out.shape[1]
    number = -1 if activation is None else activation_number(activation)
    fp8 = x.codes.dtype is not torch.int8 and fp8_dots(x.codes.device)
    block_m, block_n, block_k, warps, stages = _tile(
        tokens, columns, x.codes.dtype is torch.int8 or fp8, number >= 0
    )
    block_k = min(x_group or block_k, weight.group or block_k, block_k)
    blocks = -(-columns // block_k)
    splits = _splits(-(-tokens // block_m) * -(-rows // block_n), blocks, tokens, x.codes.device)
    whole = x.codes.dtype is torch.int8 and not (x_group or weight.group)
    into, within, beside, outliers = out, number, None, x.outliers
    assert outliers is None or (whole and outliers.x.stride(1) == 1), "beside codes that have one scale a row"
    if splits > 1:
        dtype = torch.int32 if whole else torch.float32
        into, within = torch.empty(splits, tokens, rows, dtype=dtype, device=out.device), -1
        if outliers is not None:
            beside = torch.empty(tokens, rows, device=out.device)
    tile_width = width if within >= 0 else rows
    tiles = -(-tokens // block_m) * -(-tile_width // block_n)
    inside = weight.block_rows % block_n == 0 and (within < 0 or width % weight.block_rows == 0)
    runtime.launch(
        _multiply,
        (tiles, splits),
        as_bytes(x.codes),
        as_bytes(weight.codes),
        x.scales,
        x.zeros,
        weight.scale,
        weight.sums if x.zeros is not None else None,
        bias,
        *((None, None, None) if outliers is None else (outliers.x, outliers.columns, outliers.count)),
        beside,
        into,
        0 if outliers is None else outliers.x.stride(0),
        tokens,
        tile_width,
        columns,
        out.stride(0),
        weight.scale.shape[-1] if weight.group else 0,
        weight.block_rows,
        num_warps=warps,
        num_stages=stages,
        X_FORMAT=FORMATS[x.codes.dtype],
        W_FORMAT=FORMATS[weight.codes.dtype],
        FP8_DOT=fp8,
        X_GROUP=x_group,
        W_GROUP=weight.group,
        ONE_BLOCK=bool(weight.group) and inside,
        ZERO=x.zeros is not None,
        BIAS=bias is not None,
        OUTLIERS=outliers is not None,
        ACTIVATION=within,
        SPLITS=splits,
        EVEN=columns % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    if splits > 1:
        _add_parts(into, x, x_group, weight, bias, beside, out, number)
    return out


FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def as_bytes(codes: Tensor) -> Tensor:
    """Codes as kernels are given them: 8-bit floats as uint8."""
    return codes if codes.dtype is torch.int8 else codes.view(torch.uint8)


def _splits(tiles: int, blocks: int, tokens: int, device: torch.device) -> int:
    """Parts of the columns: two programs a multiprocessor, no part shorter than four blocks."""
    if tokens > 64:
        return 1
    wanted = -(-2 * _properties(device)[0] // tiles)
    return max(min(wanted, blocks // 4, 16), 1)


def _add_parts(
    parts: Tensor,
    x: Codes,
    x_group: int,
    weight: EightBitWeight,
    bias: Tensor | None,
    beside: Tensor | None,
    out: Tensor,
    number: int,
) -> None:
    splits, tokens, rows = parts.shape
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), _FINISH_BLOCK)
    runtime.launch(
        _finish,
        (tokens, -(-width // block)),
        parts,
        x.scales,
        x.zeros,
        weight.scale,
        weight.sums if x.zeros is not None else None,
        bias,
        beside,
        out,
        tokens,
        rows,
        width,
        out.stride(0),
        X_GROUP=x_group,
        W_GROUP=weight.group,
        ZERO=x.zeros is not None,
        BIAS=bias is not None,
        OUTLIERS=beside is not None,
        ACTIVATION=number,
        SPLITS=splits,
        BLOCK=block,
    )


def _by_library(
    x: Codes,
    x_group: int,
    weight: EightBitWeight,
    bias: Tensor | None,
    narrow_bias: Tensor | None,
    out: Tensor,
    activation: str | None,
) -> bool:
    """The vendor's product through torch, where it is offered: many rows, one scale a row of each side.

    Shapes, devices and dtypes decide, never numbers; ``whole_product`` and ``scaled_product`` do the work.
    """
    device, (tokens, columns), rows = x.codes.device, x.codes.shape, len(weight.codes)
    if device.type != "cuda" or tokens < _LIBRARY_ROWS or x_group or weight.group:
        return False
    if columns % 16 or rows % 16 or x.outliers is not None:
        return False
    if x.codes.dtype is torch.int8:
        number = -1 if activation is None else activation_number(activation)
        _add_parts(whole_product(x.codes, weight.codes)[None], x, 0, weight, bias, None, out, number)
        return True
    # The product with scales of rows takes e5m2 on the left alone.
    narrow = weight.codes.dtype is torch.float8_e4m3fn
    if (
        out.dtype is not torch.bfloat16
        or not narrow
        or not fp8_dots(device)
        or (bias is not None and narrow_bias is None)
    ):
        return False
    if (x.factor is None or weight.one_scale is None) and not scales_rows(device):
        return False
    _scaled(x, weight, narrow_bias, out, activation)
    return True


def _scaled(
    x: Codes, weight: EightBitWeight, bias: Tensor | None, out: Tensor, activation: str | None
) -> None:
    """The vendor's product into bfloat16 ``out``: its gates met afterwards, as it knows none."""
    if activation is None and out.is_contiguous():
        scaled_product(x, weight, bias, out)
        return
    whole = torch.empty(len(x.codes), len(weight.codes), dtype=out.dtype, device=out.device)
    scaled_product(x, weight, bias, whole)
    if activation is None:
        out.copy_(whole)
    else:
        gated_activation(whole, activation, out)


def whole_product(x: Tensor, weight: Tensor) -> Tensor:
    """int8 (tokens, columns) @ (rows, columns).T -> int32 (tokens, rows).

    On CUDA torch wants more than 16 tokens, and columns and rows in multiples of 8.
    """
    return torch._int_mm(x, weight.t())


@cache
def scales_rows(device: torch.device) -> bool:
    """Whether torch's product of 8-bit floats takes a scale a row there: beside Hopper, its build decides."""
    codes = torch.zeros(64, 64, device=device).to(torch.float8_e4m3fn)
    scales = torch.ones(64, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def scaled_product(x: Codes, weight: EightBitWeight, bias: Tensor | None, out: Tensor) -> None:
    """8-bit floats into a bfloat16 result, with a bfloat16 bias.

    torch wants the second matrix column by column, as a weight's transpose lies, columns and rows in
    multiples of 16, and scales either (1,) of both sides or (tokens, 1) and (1, rows).
    """
    if x.factor is not None and weight.one_scale is not None:
        x_scale, w_scale = x.factor, weight.one_scale
    else:
        x_scale, w_scale = x.scales[:, None], weight.scale[None, :]
    torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x_scale,
        scale_b=w_scale,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
        out=out,
    )
