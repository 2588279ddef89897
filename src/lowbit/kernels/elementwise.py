"""The small operations between matrix products: norms, sums, gated activation, rotary embedding, gathers.

On a GPU each is one Triton kernel (``gpu.elementwise``, ``gpu.rotary``). float32 tensors on a CPU go to the
native library, where a row's bits do not depend on the other rows or on the number of threads; everything
else runs in torch, computing in float32 and rounding once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.gpu import runtime
from lowbit.kernels.step_plan import Operation

P = ParamSpec("P")
R = TypeVar("R")

SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


def _swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    steep = SWIGLU_SLOPE * gate.clamp(max=SWIGLU_LIMIT)
    return functional.silu(steep) * ((up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1) / SWIGLU_SLOPE)


# Number of the activation in csrc/activations.h, and the function of gate and up in torch.
_ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (0, lambda gate, up: functional.silu(gate) * up),
    "gelu_tanh": (1, _gelu_tanh),
    "gelu_pytorch_tanh": (1, _gelu_tanh),
    "gelu": (2, lambda gate, up: functional.gelu(gate) * up),
    "gelu_new": (1, _gelu_tanh),
    "gelu_fast": (1, _gelu_tanh),
    "swiglu_clamped": (3, _swiglu_clamped),
    "relu": (4, lambda gate, up: functional.relu(gate) * up),
    "relu2": (5, lambda gate, up: functional.relu(gate).square() * up),
}

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True)
class _Functions:
    """The native functions, with their argument types set."""

    rms_norm: Operation
    add_rms_norm: Operation
    rms_norm_heads: Operation
    layer_norm: Operation
    add: Operation
    gated_activation: Operation
    activation: Operation
    rotary: Operation
    affine: Operation
    softcap: Operation
    gather_rows: Operation
    gather_columns: Operation


@cache
def _functions() -> _Functions | None:
    library = native.library()
    if library is None:
        return None
    row = (_POINTER, _LONG)  # a matrix: its address and the floats from row to row
    declared = {
        "rms_norm": (*row, _POINTER, _FLOAT, _LONG, _INT, *row),
        "add_rms_norm": (*row, *row, _POINTER, _FLOAT, _LONG, _INT, *row),
        "rms_norm_heads": (*row, _INT, _INT, _POINTER, _FLOAT, _LONG),
        "layer_norm": (*row, _POINTER, _POINTER, _LONG, _FLOAT, _LONG, _INT, _INT, *row),
        "add": (*row, *row, _LONG, _INT),
        "gated_activation": (*row, _INT, _LONG, _INT, *row),
        "activation": (*row, _INT, _LONG, _INT, *row),
        "rotary": (*row, _INT, *row, _INT, _INT, _INT, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT),
        "affine": (*row, _LONG, _INT, _POINTER, _POINTER, _LONG, _FLOAT, _FLOAT, _POINTER, *row),
        "softcap": (*row, _LONG, _INT, _FLOAT),
        "gather_rows": (*row, _LONG, _INT, _POINTER, _LONG, *row),
        "gather_columns": (*row, _LONG, _INT, _POINTER, *row),
    }
    faults = {"rotary": _no_position, "gather_rows": _no_row}
    return _Functions(
        **{name: Operation(library, name, types, faults.get(name)) for name, types in declared.items()}
    )


def _no_position(_: int) -> Exception:
    return LowbitError("E0703", "a token's position is outside the rotary table")


def _no_row(_: int) -> Exception:
    return LowbitError("E0703", "a row that the batch does not have was asked for")


def _native_for(x: Tensor) -> _Functions | None:
    """The native functions where x is a float32 matrix on the CPU whose rows are contiguous."""
    if x.is_cpu and x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1:
        return _functions()
    return None


def _or_triton(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, or what ``gpu.elementwise`` or ``gpu.rotary`` calls so where Triton takes the first
    argument."""

    @wraps(function)
    def dispatched(*arguments: P.args, **named: P.kwargs) -> R:
        if not runtime.runs_on(cast(Tensor, arguments[0]).device):
            return function(*arguments, **named)
        from lowbit.kernels.gpu import elementwise, rotary

        module = rotary if hasattr(rotary, function.__name__) else elementwise
        return cast(R, getattr(module, function.__name__)(*arguments, **named))

    return dispatched


@_or_triton
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich, 2019). ``out`` may be x.

    ``dtype``: of what is made where there is no ``out``; None: as x.
    """
    if out is None:
        out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    functions = _native_for(x)
    if functions is None or _native_for(out) is None:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
        return out.copy_(normed)
    rows, width = x.shape
    _check_weight(weight, width)
    _check_out(out, x.shape)
    functions.rms_norm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), eps, rows, width, out.data_ptr(), out.stride(0)
    )
    return out


@_or_triton
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``residual += x`` in place, then its RMSNorm, in ``dtype`` (None: as the stream)."""
    functions = _native_for(x)
    if functions is None or _native_for(residual) is None or dtype not in (None, torch.float32):
        residual.add_(x)
        return rms_norm(residual, weight, eps, dtype=dtype)
    rows, width = residual.shape
    _check_weight(weight, width)
    assert x.shape == residual.shape, "a layer's output and the residual stream have one shape"
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    functions.add_rms_norm(
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        weight.data_ptr(),
        eps,
        rows,
        width,
        out.data_ptr(),
        width,
    )
    return out


@_or_triton
def rms_norm_heads(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of every head of (tokens, heads, head_dim), in place; it may be a view of a fused output."""
    functions = _functions()
    if functions is None or not _is_strided(heads):
        wide = heads.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
        return heads.copy_(normed)
    tokens, count, dim = heads.shape
    _check_weight(weight, dim)
    functions.rms_norm_heads(heads.data_ptr(), heads.stride(0), count, dim, weight.data_ptr(), eps, tokens)
    return heads


@_or_triton
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    groups: int = 1,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (Ba et al., 2016). ``out`` may be x.

    Each of a row's ``groups`` groups of neighbours by itself; weight and bias are as wide as x or as a group.
    ``dtype``: of what is made where there is no ``out``; None: as x.
    """
    if out is None:
        out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    width = x.shape[-1] // groups
    functions = _native_for(x)
    if functions is None or _native_for(out) is None:
        wide = x.float().unflatten(-1, (groups, width))
        normed = functional.layer_norm(wide, (width,), eps=eps) * weight.float().view(-1, width)
        normed = normed if bias is None else normed + bias.float().view(-1, width)
        return out.copy_(normed.flatten(-2))
    spread = 0 if weight.numel() == width else width
    for vector in (weight,) if bias is None else (weight, bias):
        _check_weight(vector, groups * width if spread else width)
    _check_out(out, x.shape)
    functions.layer_norm(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        spread,
        eps,
        x.shape[0],
        groups,
        width,
        out.data_ptr(),
        out.stride(0),
    )
    return out


@_or_triton
def add(x: Tensor, total: Tensor) -> Tensor:
    """``total += x`` in place."""
    functions = _native_for(x)
    if functions is None or _native_for(total) is None:
        return total.add_(x)
    assert x.shape == total.shape, "a layer's output and the residual stream have one shape"
    functions.add(x.data_ptr(), x.stride(0), total.data_ptr(), total.stride(0), *x.shape)
    return total


@_or_triton
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
    """x (tokens, width) * column * factor * number / divisor + bias, in this order. ``out`` may be x.

    ``column``, ``bias``: (width,). ``factor``: float32, one for each token or a single one.
    """
    rows, width = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    functions = _native_for(x)
    given = [tensor for tensor in (column, factor, bias) if tensor is not None]
    plain = all(tensor.dtype is torch.float32 and tensor.is_contiguous() for tensor in given)
    if functions is None or _native_for(out) is None or not plain:
        # Beside narrower types, factors are applied in float32.
        y = x if column is None else x * column
        if factor is not None:
            y = y.float() * (factor if factor.numel() == 1 else factor.view(-1, 1))
        y = y if number == 1.0 else y * number
        y = y if divisor == 1.0 else y / divisor
        return out.copy_(y if bias is None else y + bias)
    assert all(tensor.numel() == width for tensor in (column, bias) if tensor is not None), "one a column"
    assert factor is None or factor.numel() in (1, rows), "one factor, or one a token"
    _check_out(out, x.shape)
    functions.affine(
        x.data_ptr(),
        x.stride(0),
        rows,
        width,
        None if column is None else column.data_ptr(),
        None if factor is None else factor.data_ptr(),
        int(factor is not None and factor.numel() > 1),
        number,
        divisor,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
    )
    return out


@_or_triton
def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place (Gemma 2, 2024)."""
    functions = _native_for(x)
    if functions is None:
        return x.copy_(cap * torch.tanh(x / cap))
    functions.softcap(x.data_ptr(), x.stride(0), *x.shape, cap)
    return x


@_or_triton
def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows]; ``rows``: int64 (count,)."""
    functions = _native_for(x)
    if functions is None:
        return x[rows]
    assert rows.dtype is torch.int64 and rows.is_contiguous(), "rows are int64 and contiguous"
    width = x.shape[1]
    out = torch.empty(len(rows), width)
    functions.gather_rows(
        x.data_ptr(), x.stride(0), len(x), width, rows.data_ptr(), len(rows), out.data_ptr(), width
    )
    return out


@_or_triton
def gather_columns(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order]; ``order``: int64, of x's columns."""
    functions = _native_for(x)
    if functions is None:
        return x.index_select(1, order)
    assert order.dtype is torch.int64 and order.is_contiguous(), "an order is int64 and contiguous"
    rows, width = len(x), len(order)
    out = torch.empty(rows, width)
    functions.gather_columns(x.data_ptr(), x.stride(0), rows, width, order.data_ptr(), out.data_ptr(), width)
    return out


def _check_weight(weight: Tensor, width: int) -> None:
    assert weight.numel() == width and weight.dtype is torch.float32 and weight.is_contiguous(), (
        "a norm's weight is float32 and as wide as what it normalizes"
    )


def _check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    assert out.shape == shape, f"the result has {tuple(out.shape)} instead of {tuple(shape)}"


def activation_number(activation: str) -> int:
    """The activation's number in native code; E0242 where there is none of this name."""
    known = _ACTIVATIONS.get(activation)
    if known is None:
        raise LowbitError(
            "E0242", f"activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return known[0]


@_or_triton
def gated_activation(gate_up: Tensor, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """gate_up (tokens, 2 * width), gate first -> activation(gate) * up (tokens, width).

    ``swiglu_clamped`` is gpt-oss': (up + 1) * gate * sigmoid(1.702 gate), gate <= 7 and |up| <= 7.
    """
    number = activation_number(activation)
    width = gate_up.shape[-1] // 2
    if out is None:
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
    functions = _native_for(gate_up)
    if functions is None or _native_for(out) is None:
        gate, up = gate_up.float().chunk(2, -1)
        return out.copy_(_ACTIVATIONS[activation][1](gate, up))
    _check_out(out, (len(gate_up), width))
    functions.gated_activation(
        gate_up.data_ptr(),
        gate_up.stride(0),
        number,
        gate_up.shape[0],
        width,
        out.data_ptr(),
        out.stride(0),
    )
    return out


@_or_triton
def activated(x: Tensor, activation: str) -> Tensor:
    """activation(x) of (tokens, width), in place."""
    number = activation_number(activation)
    functions = _native_for(x)
    if functions is None:
        return x.copy_(_ACTIVATIONS[activation][1](x.float(), torch.ones(())))
    functions.activation(x.data_ptr(), x.stride(0), number, *x.shape, x.data_ptr(), x.stride(0))
    return x


@dataclass(frozen=True)
class RotaryTable:
    """float32 (positions, rotary_dim / 2) cosines and sines of position times frequency."""

    cosines: Tensor
    sines: Tensor

    @staticmethod
    def build(frequencies: Tensor, positions: int, magnitude: float, device: torch.device) -> RotaryTable:
        """``frequencies``: float32 (rotary_dim / 2,) radians a token; ``magnitude`` scales both tables.

        Angles are float32 products, as in transformers, whose rounding models were trained with.
        """
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies.float().cpu())
        cosines, sines = angles.cos() * magnitude, angles.sin() * magnitude
        return RotaryTable(cosines.to(device).contiguous(), sines.to(device).contiguous())


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms over every head of Q and of K; weights: float32 (head dim,)."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


@_or_triton
def apply_rotary(
    q: Tensor,
    k: Tensor,
    table: RotaryTable,
    positions: Tensor,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate q (tokens, heads, dim) and k (tokens, kv heads, dim) in place (RoFormer: Su et al., 2021).

    The table's width says how many leading dimensions of a head turn: halves with each other, or with
    ``interleaved`` neighbours. ``positions``: int32 (tokens,). q and k may be views of one fused output.
    ``norms``: what comes before, in the same launch on a GPU.
    """
    if norms is not None:
        rms_norm_heads(q, norms.q_weight, norms.eps)
        rms_norm_heads(k, norms.k_weight, norms.eps)
    if not (_is_strided(q) and _is_strided(k) and (functions := _functions()) is not None):
        _rotate(q, table, positions, interleaved)
        _rotate(k, table, positions, interleaved)
        return
    tokens, q_heads, dim = q.shape
    rows, half = table.cosines.shape
    assert k.shape[0] == tokens and k.shape[2] == dim and 2 * half <= dim, (
        "q, k and the table belong together"
    )
    assert positions.dtype is torch.int32 and positions.is_contiguous(), "positions are int32 and contiguous"
    assert len(positions) == tokens, "one position a token"
    functions.rotary(
        q.data_ptr(),
        q.stride(0),
        q_heads,
        k.data_ptr(),
        k.stride(0),
        k.shape[1],
        dim,
        2 * half,
        table.cosines.data_ptr(),
        table.sines.data_ptr(),
        rows,
        positions.data_ptr(),
        tokens,
        interleaved,
    )


def _is_strided(x: Tensor) -> bool:
    """float32 on the CPU with contiguous heads, so that one number says where the next token is."""
    return x.is_cpu and x.dtype is torch.float32 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _rotate(x: Tensor, table: RotaryTable, positions: Tensor, interleaved: bool) -> None:
    rows = positions.long()
    cosines, sines = table.cosines[rows].unsqueeze(1), table.sines[rows].unsqueeze(1)  # (tokens, 1, half)
    half = cosines.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned_first = first.float() * cosines - second.float() * sines
    turned_second = second.float() * cosines + first.float() * sines
    first.copy_(turned_first)
    second.copy_(turned_second)
