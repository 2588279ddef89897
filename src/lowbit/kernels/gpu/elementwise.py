"""The functions of ``kernels.elementwise`` in Triton: one launch each, float32 inside, rounded once.

``rotary`` has the rotary embedding.

Every function takes what its namesake takes: tensors of float32, bfloat16 and float16 in any mixture, rows
that lie further apart than they are wide, views of fused outputs. All grids follow from shapes alone, so that
every launch can be captured in a CUDA graph.

How work is cut. What has no sums runs in tiles of 1,024 numbers and 4 warps: loads of 8 bytes (bfloat16) or
16 bytes (float32) a thread. A norm's program holds whole rows in registers, 16 to 32 numbers a thread: short
ones (heads) several at once, until a tile has 1,024 numbers; rows wider than 16,384 are read again for each
pass. All of it is bound by memory, so nothing else is worth a choice. None of it has run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.elementwise import SWIGLU_LIMIT, SWIGLU_SLOPE, activation_number
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.language import cast

TILE = 1024  # numbers of a program, where rows are no wider
WIDEST = 16384  # of a row that a program holds in registers

_LIMIT, _SLOPE = tl.constexpr(SWIGLU_LIMIT), tl.constexpr(SWIGLU_SLOPE)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Within 1e-7 of tanh, and without infinity between."""
    steep = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - steep) / (1.0 + steep)
    return tl.where(x < 0, -size, size)


@triton.jit
def activate(gate, up, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    """activation(gate) * up in float32; ``NUMBER``: ``elementwise.activation_number``."""
    if NUMBER == 0:
        y = gate * tl.sigmoid(gate) * up
    elif NUMBER == 1:  # x (1 + tanh u) / 2 is x sigmoid(2 u)
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif NUMBER == 2:
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif NUMBER == 3:
        low = tl.where(gate > _LIMIT, _LIMIT, gate)  # a NaN stays one
        within = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
        y = low * tl.sigmoid(low * _SLOPE) * (within + 1.0)
    else:
        positive = tl.where(gate < 0, 0.0, gate)
        y = (positive if NUMBER == 4 else positive * positive) * up
    return y


@triton.jit(do_not_specialize=["rows"])
def _norm(  # type: ignore[no-untyped-def]
    x,
    x_row,
    x_group,
    total,
    total_row,
    weight,
    bias,
    out,
    out_row,
    out_group,
    rows,
    groups,
    width,
    spread,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    CENTRED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """RMSNorm, or LayerNorm where ``CENTRED``, of ``groups`` runs of ``width`` numbers in each row.

    A program has ``ROWS`` of these runs. ``ADDED``: x is added to ``total`` first, in place, one group a row.
    ``spread``: from a group's weights to the next one's. ``WHOLE``: a run is no wider than ``BLOCK``.
    """
    run = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, group = (run // groups).to(tl.int64), run % groups
    columns = tl.arange(0, BLOCK)
    x += (row * x_row + group * x_group)[:, None] + columns[None, :]
    out += (row * out_row + group * out_group)[:, None] + columns[None, :]
    total += (row * total_row)[:, None] + columns[None, :]
    weights = (group * spread)[:, None] + columns[None, :]
    present = (run < rows)[:, None]
    if WHOLE:
        inside = present & (columns < width)[None, :]
        y = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        if ADDED:
            y += tl.load(total, mask=inside, other=0.0).to(tl.float32)
            tl.store(total, cast(y, total.dtype.element_ty), mask=inside)
        if CENTRED:
            y = tl.where(inside, y - (tl.sum(y, 1) / width)[:, None], 0.0)
        y = y * tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
        y = y * tl.load(weight + weights, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            y += tl.load(bias + weights, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, cast(y, out.dtype.element_ty), mask=inside)
    else:
        source = total if ADDED else x
        mean = tl.zeros((ROWS, 1), tl.float32)
        if ADDED or CENTRED:
            for start in range(0, width, BLOCK):
                inside = present & (start + columns < width)[None, :]
                y = tl.load(x + start, mask=inside, other=0.0).to(tl.float32)
                if ADDED:
                    y += tl.load(total + start, mask=inside, other=0.0).to(tl.float32)
                    tl.store(total + start, cast(y, total.dtype.element_ty), mask=inside)
                if CENTRED:
                    mean += tl.sum(y, 1)[:, None] / width
            tl.debug_barrier()  # other threads read what these wrote
        squares = tl.zeros((ROWS, 1), tl.float32)
        for start in range(0, width, BLOCK):
            inside = present & (start + columns < width)[None, :]
            y = tl.load(source + start, mask=inside, other=0.0).to(tl.float32)
            y = tl.where(inside, y - mean, 0.0)
            squares += tl.sum(y * y, 1)[:, None]
        factor = tl.rsqrt(squares / width + eps)
        for start in range(0, width, BLOCK):
            inside = present & (start + columns < width)[None, :]
            y = tl.load(source + start, mask=inside, other=0.0).to(tl.float32)
            y = (y - mean) * factor * tl.load(weight + weights + start, mask=inside, other=0.0).to(tl.float32)
            if BIASED:
                y += tl.load(bias + weights + start, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + start, cast(y, out.dtype.element_ty), mask=inside)


def _launch_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    *,
    groups: tuple[int, int, int] = (1, 0, 0),
    spread: int = 0,
    bias: Tensor | None = None,
    total: Tensor | None = None,
    centred: bool = False,
) -> Tensor:
    """``groups``: how many there are in a row, and from one to the next in x and in ``out``."""
    assert x.stride(-1) == out.stride(-1) == 1, "a row's numbers lie one behind another"
    count, x_group, out_group = groups
    width = x.shape[-1] // count if x.dim() == 2 else x.shape[-1]
    runs = x.shape[0] * count
    if not runs:
        return out
    block = min(triton.next_power_of_2(width), WIDEST)
    together = max(TILE // block, 1)
    runtime.launch(
        _norm,
        (triton.cdiv(runs, together),),
        x,
        x.stride(0),
        x_group,
        x if total is None else total,
        0 if total is None else total.stride(0),
        weight,
        bias,
        out,
        out.stride(0),
        out_group,
        runs,
        count,
        width,
        spread,
        float(eps),
        num_warps=_warps(together * block),
        ROWS=together,
        BLOCK=block,
        WHOLE=width <= block,
        CENTRED=centred,
        BIASED=bias is not None,
        ADDED=total is not None,
    )
    return out


def _warps(numbers: int) -> int:
    """16 numbers a thread, more in the widest tiles."""
    return min(max(numbers // 512, 1), 16)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """See ``elementwise.rms_norm``."""
    return _launch_norm(x, weight, eps, _beside(x, out, dtype))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See ``elementwise.add_rms_norm``."""
    assert x.shape == residual.shape, "a layer's output and the residual stream have one shape"
    return _launch_norm(x, weight, eps, _beside(residual, None, dtype), total=residual)


def rms_norm_heads(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``elementwise.rms_norm_heads``."""
    step = heads.stride(1)
    return _launch_norm(heads, weight, eps, heads, groups=(heads.shape[1], step, step))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    groups: int = 1,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``elementwise.layer_norm``."""
    out = _beside(x, out, dtype)
    width = x.shape[-1] // groups
    return _launch_norm(
        x,
        weight,
        eps,
        out,
        groups=(groups, width, width),
        spread=0 if weight.numel() == width else width,
        bias=bias,
        centred=True,
    )


def _beside(x: Tensor, out: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """``out``, or a new matrix as large as x."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) if out is None else out


@triton.jit
def _place(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, columns, which of them there are) of a program's tile."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < rows) & (column < width)


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of ``_place``'s tiles over a matrix, and their shape: one for all numbers of rows, as each is
    a kernel to compile."""
    block = min(triton.next_power_of_2(width), TILE)
    together = TILE // block
    return (triton.cdiv(rows, together), triton.cdiv(width, block)), {"ROWS": together, "BLOCK": block}


@triton.jit(do_not_specialize=["rows"])
def _add(x, x_row, total, total_row, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _place(rows, width, ROWS, BLOCK)
    into = total + row * total_row + column
    y = tl.load(into, mask=inside).to(tl.float32)
    y += tl.load(x + row * x_row + column, mask=inside).to(tl.float32)
    tl.store(into, cast(y, total.dtype.element_ty), mask=inside)


def add(x: Tensor, total: Tensor) -> Tensor:
    """See ``elementwise.add``."""
    assert x.shape == total.shape, "a layer's output and the residual stream have one shape"
    if x.numel():
        grid, tile = _tiles(*x.shape)
        runtime.launch(_add, grid, x, x.stride(0), total, total.stride(0), *x.shape, **tile)
    return total


@triton.jit(do_not_specialize=["rows"])
def _affine(  # type: ignore[no-untyped-def]
    x,
    x_row,
    out,
    out_row,
    rows,
    width,
    column_factors,
    row_factors,
    row_factor_step,
    bias,
    number,
    divisor,
    BY_COLUMN: tl.constexpr,
    BY_ROW: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _place(rows, width, ROWS, BLOCK)
    y = tl.load(x + row * x_row + column, mask=inside).to(tl.float32)
    if BY_COLUMN:
        y *= tl.load(column_factors + column, mask=column < width).to(tl.float32)
    if BY_ROW:
        y *= tl.load(row_factors + row * row_factor_step, mask=row < rows).to(tl.float32)
    y = tl.div_rn(y * number, tl.full(y.shape, divisor, tl.float32))
    if BIASED:
        y += tl.load(bias + column, mask=column < width).to(tl.float32)
    tl.store(out + row * out_row + column, cast(y, out.dtype.element_ty), mask=inside)


def affine(
    x: Tensor,
    *,
    column: Tensor | None = None,
    factor: Tensor | None = None,
    number: float = 1.0,
    divisor: float = 1.0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``elementwise.affine``."""
    out = _beside(x, out, None)
    rows, width = x.shape
    assert all(tensor.numel() == width for tensor in (column, bias) if tensor is not None), "one a column"
    assert factor is None or factor.numel() in (1, rows), "one factor, or one a token"
    if x.numel():
        grid, tile = _tiles(rows, width)
        runtime.launch(
            _affine,
            grid,
            x,
            x.stride(0),
            out,
            out.stride(0),
            rows,
            width,
            column,
            factor,
            int(factor is not None and factor.numel() > 1),
            bias,
            float(number),
            float(divisor),
            BY_COLUMN=column is not None,
            BY_ROW=factor is not None,
            BIASED=bias is not None,
            **tile,
        )
    return out


@triton.jit(do_not_specialize=["rows"])
def _softcap(x, x_row, rows, width, cap, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _place(rows, width, ROWS, BLOCK)
    place = x + row * x_row + column
    y = cap * _tanh(tl.load(place, mask=inside).to(tl.float32) / cap)
    tl.store(place, cast(y, x.dtype.element_ty), mask=inside)


def softcap(x: Tensor, cap: float) -> Tensor:
    """See ``elementwise.softcap``."""
    if x.numel():
        grid, tile = _tiles(*x.shape)
        runtime.launch(_softcap, grid, x, x.stride(0), *x.shape, float(cap), **tile)
    return x


@triton.jit(do_not_specialize=["rows"])
def _gather(  # type: ignore[no-untyped-def]
    x,
    x_row,
    out,
    out_row,
    places,
    rows,
    width,
    OF_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r, c] = x[places[r], c], or x[r, places[c]]."""
    row, column, inside = _place(rows, width, ROWS, BLOCK)
    if OF_ROWS:
        source = x + tl.load(places + row, mask=row < rows, other=0) * x_row + column
    else:
        source = x + row * x_row + tl.load(places + column, mask=column < width, other=0)
    tl.store(out + row * out_row + column, tl.load(source, mask=inside), mask=inside)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """See ``elementwise.gather_rows``; a row that there is not is not noticed."""
    return _gathered(x, rows, (len(rows), x.shape[1]), True)


def gather_columns(x: Tensor, order: Tensor) -> Tensor:
    """See ``elementwise.gather_columns``."""
    return _gathered(x, order, (x.shape[0], len(order)), False)


def _gathered(x: Tensor, places: Tensor, shape: tuple[int, int], of_rows: bool) -> Tensor:
    assert places.dtype is torch.int64 and places.is_contiguous(), "rows and orders are int64 and contiguous"
    out = x.new_empty(shape)
    if out.numel():
        grid, tile = _tiles(*shape)
        runtime.launch(
            _gather, grid, x, x.stride(0), out, out.stride(0), places, *shape, OF_ROWS=of_rows, **tile
        )
    return out


@triton.jit(do_not_specialize=["rows"])
def _activation(  # type: ignore[no-untyped-def]
    x,
    x_row,
    out,
    out_row,
    rows,
    width,
    NUMBER: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gates are the first ``width`` of x's columns, what they gate the next."""
    row, column, inside = _place(rows, width, ROWS, BLOCK)
    source = x + row * x_row + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.full(gate.shape, 1.0, tl.float32)
    if GATED:
        up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, up, NUMBER)
    tl.store(out + row * out_row + column, cast(y, out.dtype.element_ty), mask=inside)


def gated_activation(gate_up: Tensor, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """See ``elementwise.gated_activation``."""
    width = gate_up.shape[-1] // 2
    if out is None:
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _launch_activation(gate_up.flatten(0, -2), out.view(-1, width), activation, gated=True)
    return out


def activated(x: Tensor, activation: str) -> Tensor:
    """See ``elementwise.activated``."""
    _launch_activation(x, x, activation, gated=False)
    return x


def _launch_activation(x: Tensor, out: Tensor, activation: str, gated: bool) -> None:
    number = activation_number(activation)
    if out.numel():
        grid, tile = _tiles(*out.shape)
        runtime.launch(
            _activation,
            grid,
            x,
            x.stride(0),
            out,
            out.stride(0),
            *out.shape,
            NUMBER=number,
            GATED=gated,
            **tile,
        )


@triton.jit(do_not_specialize=["rows"])
def _sigmoid_gate(x, x_row, gate, gate_row, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _place(rows, width, ROWS, BLOCK)
    place = x + row * x_row + column
    steep = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32) * tl.sigmoid(steep)
    tl.store(place, cast(y, x.dtype.element_ty), mask=inside)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """See ``recurrent_cpu.sigmoid_gate``."""
    assert x.shape == gate.shape and x.stride(1) == gate.stride(1) == 1, "rows of both lie alike"
    if x.numel():
        grid, tile = _tiles(*x.shape)
        runtime.launch(_sigmoid_gate, grid, x, x.stride(0), gate, gate.stride(0), *x.shape, **tile)
    return x
