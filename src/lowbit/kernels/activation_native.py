"""The native side of input quantization (csrc/activation_quant.cpp): its structs and calls.

What the code computes is defined by ``activation_quant``, in torch; here is how a scheme is told to it.
Where ranks have some columns of x each, ``stage`` and ``finish`` do in two calls what a call does in one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.step_plan import Operation, no_memory
from lowbit.numerics.scheme import ActivationScheme

# The numbers of csrc/activation_quant.cpp.
_RULES = ("none", "fixed", "token", "asymmetric", "tensor", "delayed", "grouped", "columns")
_FACTORS = {"token": "row", "asymmetric": "row", "columns": "row", "tensor": "one", "delayed": "one"}
_FORMATS = {"e4m3": 1, "e5m2": 2, "e2m1": 3, "e2m3": 4, "e3m2": 5}
_INTEGER = 0
_SCALES = {"f32": 0, "bf16": 1, "e8m0": 2, "e4m3": 4}
_E8M0_UP, _E8M0_SPREAD = 3, 5
_NO_MEMORY = no_memory("to quantize inputs")


class _Quantizer(ctypes.Structure):
    """lowbit_quantizer."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rotation", "multiplier", "static_scale", "static_zero")),
        *((name, ctypes.c_void_p) for name in ("state_scale", "state_history")),
        *((name, ctypes.c_int32) for name in ("rule", "format", "scale", "group")),
        *((name, ctypes.c_float) for name in ("low", "high", "limit")),
        *((name, ctypes.c_float) for name in ("floor", "upper_bound", "outliers", "round_up")),
        *((name, ctypes.c_int32) for name in ("bfloat_input", "reciprocal")),
    )


class _DelayedState(ctypes.Structure):
    """lowbit_delayed_state."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("history", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("largest", ctypes.c_float),
        ("most_recent", ctypes.c_int32),
    )


@dataclass(frozen=True)
class _Functions:
    """``stage`` and ``finish`` are in no plan: what ranks tell each other between them cannot be."""

    quantize: Operation
    update: Operation
    stage: Callable[..., int]
    finish: Callable[..., int]


@cache
def _functions() -> _Functions | None:
    library = native.library()
    if library is None:
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, long, long, long, pointer, long, pointer)
    stage, finish = library.lowbit_stage_input, library.lowbit_quantize_staged
    stage.argtypes, stage.restype = arguments, ctypes.c_int32
    finish.argtypes, finish.restype = (pointer, pointer, long, long, long, pointer, pointer), ctypes.c_int32
    return _Functions(
        Operation(library, "quantize_input", arguments, _NO_MEMORY),
        Operation(library, "update_delayed", (pointer, long)),
        stage,
        finish,
    )


@dataclass(frozen=True)
class Buffers:
    """The tensors of an InputTransform, float32 on the CPU."""

    multiplier: Tensor | None
    static_scale: Tensor | None
    static_zero: Tensor | None
    state_scale: Tensor | None
    state_history: Tensor | None
    rotation: Rotator | None = None

    def addresses(self) -> list[int | None] | None:
        """For the struct; None where one of them is not what the native code reads."""
        found: list[int | None] = [None]
        if self.rotation is not None:
            if self.rotation.native is None:
                return None
            found = [ctypes.addressof(self.rotation.native)]
        for name in ("multiplier", "static_scale", "static_zero", "state_scale", "state_history"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                found.append(None)
                continue
            if not (tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()):
                return None
            if name.startswith("static") and tensor.numel() != 1:
                return None
            found.append(tensor.data_ptr())
        return found


def _rule(scheme: ActivationScheme | None) -> str:
    if scheme is None:
        return "none"
    if scheme.block[1]:
        return "grouped"
    if scheme.mode != "dynamic":
        return "fixed" if scheme.mode == "static" else "delayed"
    if not scheme.symmetric:
        return "asymmetric"
    if scheme.outliers:
        return "columns"
    return "tensor" if scheme.block[0] == 0 else "token"


@dataclass(frozen=True)
class NativeQuantizer:
    """One transform as the native code knows it. ``factors``: "row", "one" or "" for none."""

    description: _Quantizer
    buffers: Buffers  # kept alive for the addresses
    factors: str

    @property
    def by_rows(self) -> bool:
        """Whether every row is treated by itself."""
        return _RULES[self.description.rule] not in ("tensor", "delayed", "columns")

    @staticmethod
    def of(scheme: ActivationScheme | None, buffers: Buffers, limit: float) -> NativeQuantizer | None:
        """None where the transform runs in torch. ``limit``: the value a largest |x| becomes."""
        addresses = buffers.addresses()
        if addresses is None or _functions() is None:
            return None
        rule = _rule(scheme)
        if scheme is None:
            return NativeQuantizer(_Quantizer(*addresses, rule=0), buffers, "")
        fmt = scheme.number_format
        if fmt.is_integer and fmt.bits <= 8:
            low = -(1 << int(fmt.bits) - 1) if fmt.name.startswith("int") else 0
            number, high = _INTEGER, float(low + (1 << int(fmt.bits)) - 1)
        elif fmt.name in _FORMATS and fmt.values is not None:
            number, high = _FORMATS[fmt.name], max(value for value in fmt.values if abs(value) < 1e30)
            low = -int(high)
        else:
            return None
        if scheme.scale.name not in _SCALES:
            return None
        scale = _SCALES[scheme.scale.name]
        if scheme.scale.name == "e8m0" and scheme.limit:
            scale = _E8M0_UP
        if scheme.spread:
            scale, limit = _E8M0_SPREAD, scheme.spread
        description = _Quantizer(
            *addresses,
            rule=_RULES.index(rule),
            format=number,
            scale=scale,
            group=scheme.block[1],
            low=low,
            high=high,
            limit=limit,
            floor=scheme.floor,
            upper_bound=scheme.upper_bound,
            outliers=scheme.outliers,
            round_up=scheme.round_up,
            bfloat_input=scheme.input == "bf16",
            reciprocal=scheme.reciprocal,
        )
        return NativeQuantizer(description, buffers, _FACTORS.get(rule, ""))

    @property
    def address(self) -> int:
        """Of the struct, which lives as long as this."""
        return ctypes.addressof(self.description)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x float32 (tokens, in) with contiguous rows -> codes or values, and the factors the rule makes."""
        rows, width = self._shape(x)
        out, factors = torch.empty(rows, width), self._empty_factors(rows)
        functions = _functions()
        assert functions is not None, "there is a library: of() asked"
        functions.quantize(
            ctypes.byref(self.description),
            x.data_ptr(),
            x.stride(0),
            rows,
            width,
            out.data_ptr(),
            width,
            None if factors is None else factors.data_ptr(),
        )
        return out, factors

    def _shape(self, x: Tensor) -> tuple[int, int]:
        rows, width = x.shape
        multiplier = self.buffers.multiplier
        assert multiplier is None or len(multiplier) == width, "a multiplier is as wide as x"
        rotation = self.buffers.rotation
        assert rotation is None or width % rotation.rotation.size == 0, "x is whole blocks of a rotation"
        return rows, width

    def _empty_factors(self, rows: int) -> Tensor | None:
        if not self.factors:
            return None
        return torch.empty(rows, 1) if self.factors == "row" else torch.empty(1)

    def stage(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 (tokens, in) with contiguous rows -> as it will be quantized, and (tokens, 2) what scales
        depend on: of a row in parts the largest of each part's."""
        rows, width = self._shape(x)
        out, seen = torch.empty(rows, width), torch.empty(rows, 2)
        functions = _functions()
        assert functions is not None, "there is a library: of() asked"
        described = ctypes.byref(self.description)
        place = x.data_ptr(), x.stride(0)
        if functions.stage(described, *place, rows, width, out.data_ptr(), width, seen.data_ptr()):
            raise _NO_MEMORY(1)
        return out, seen

    def finish(self, staged: Tensor, seen: Tensor) -> Tensor | None:
        """Quantize what ``stage`` gave, in place, by what was seen of whole rows; the factors."""
        rows, width = staged.shape
        assert self.factors and seen.shape == (rows, 2) and seen.is_contiguous(), "of a rule with scales"
        factors, functions = self._empty_factors(rows), _functions()
        assert functions is not None and factors is not None, "there is a library: of() asked"
        described = ctypes.byref(self.description)
        place = staged.data_ptr(), staged.stride(0)
        if functions.finish(described, *place, rows, width, seen.data_ptr(), factors.data_ptr()):
            raise _NO_MEMORY(1)
        return factors


@dataclass(frozen=True)
class DelayedUpdate:
    """The end of a step for many states in one call."""

    states: ctypes.Array[_DelayedState]
    buffers: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(states: list[tuple[Tensor, Tensor, float, bool]]) -> DelayedUpdate | None:
        """Of (scale, history, largest value, most recent only); None where they are not on the CPU."""
        if _functions() is None or not all(scale.is_cpu for scale, *_ in states):
            return None
        described = [
            _DelayedState(scale.data_ptr(), history.data_ptr(), len(history), largest, recent)
            for scale, history, largest, recent in states
        ]
        array = (_DelayedState * len(described))(*described)
        return DelayedUpdate(array, tuple((scale, history) for scale, history, *_ in states))

    def __call__(self) -> None:
        """Update all of them."""
        functions = _functions()
        assert functions is not None, "there is a library: of() asked"
        functions.update(ctypes.byref(self.states), len(self.states))
