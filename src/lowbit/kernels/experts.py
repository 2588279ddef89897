"""Mixtures of experts: routing, and a batch's experts in one call, native (csrc/experts.cpp) or on a GPU.

The code knows an expert as two matrices of one or more packed weights each, with what happens to the rows
before (``InputTransform``, a column order) and after (row scales, biases). A token's result has the bits that
its experts give one by one (``layers.experts``), whoever else is in the batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.cpu_columns import ColumnsWeight
from lowbit.kernels.elementwise import activation_number
from lowbit.kernels.gpu import runtime
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import NativeWeight
from lowbit.kernels.prompt_rows import first_prompt_row
from lowbit.kernels.rounded_output import OutputTransform
from lowbit.kernels.step_plan import Operation

PROMPT_TOKENS = 512  # of a step, as --chunked-prefill-size is unless set
LEAST_EACH = 64  # tokens of an expert for which rounding its weights (``prompt_rows``) pays

# The numbers of csrc/experts.cpp.
RULES = ("softmax_top_k", "top_k_softmax", "group_softmax", "group_sigmoid")
_FACTORS = {"": 0, "row": 1, "one": 2}

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Routing(ctypes.Structure):
    """lowbit_routing."""

    _fields_ = (
        ("correction", _POINTER),
        *((name, _INT) for name in ("rule", "experts", "k", "groups", "kept", "renormalize")),
        ("scale", ctypes.c_float),
    )


class _Input(ctypes.Structure):
    """lowbit_expert_input."""

    _fields_ = (
        *((name, _POINTER) for name in ("quantizer", "static_factor", "column_order")),
        ("factors", _INT),
    )


class _Part(ctypes.Structure):
    """lowbit_expert_part."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "by_columns", "row_scale")),
        *((name, _LONG) for name in ("first", "rows", "input")),
    )


class _Matrices(ctypes.Structure):
    """lowbit_expert_matrices."""

    _fields_ = (
        *((name, _POINTER) for name in ("parts", "first_part", "inputs", "first_input", "biases")),
        ("rows", _LONG),
        ("columns", _LONG),
        ("most_inputs", _INT),
        ("shared", _INT),
    )


class ExpertsDescription(ctypes.Structure):
    """lowbit_experts."""

    _fields_ = (("gate_up", _Matrices), ("down", _Matrices), ("count", _INT), ("activation", _INT))


@dataclass(frozen=True)
class _Functions:
    route: Operation
    mix: Operation


@cache
def _functions() -> _Functions | None:
    library = native.library()
    if library is None:
        return None
    route = (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER)
    rows = (_POINTER, _LONG)
    mix = (_POINTER, *rows, _LONG, _POINTER, _POINTER, _INT, *rows, *rows, _LONG)
    return _Functions(
        Operation(library, "route_tokens", route), Operation(library, "mix_experts", mix, _fault)
    )


def _fault(status: int) -> Exception:
    if status == 1:
        return MemoryError("no memory for a batch's experts")
    return LowbitError("E0703", "an expert that the layer does not have was chosen")


def route(
    logits: Tensor,
    rule: str,
    k: int,
    *,
    groups: int = 1,
    kept: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """int64 and float32 (tokens, k): see ``layers.routing``. None where torch must do it.

    Exponentials (0 below 2^-126) and sums are this library's own, so that weights may differ from torch's in
    the last bits.
    """
    if runtime.runs_on(logits.device):
        from lowbit.kernels.gpu.routing import route as route_on_gpu

        return route_on_gpu(logits, rule, k, groups, kept, renormalize, scale, correction)
    functions = _functions()
    if functions is None or not (logits.is_cpu and logits.dtype is torch.float32 and logits.stride(1) == 1):
        return None
    tokens, experts = logits.shape
    assert k <= experts and experts % groups == 0 and kept <= groups, "the config was checked"
    if correction is not None:
        assert correction.dtype is torch.float32 and correction.is_contiguous() and len(correction) == experts
    described = _Routing(
        None if correction is None else correction.data_ptr(),
        *(RULES.index(rule), experts, k, groups, kept, renormalize, scale),
    )
    chosen, weights = torch.empty(tokens, k, dtype=torch.int64), torch.empty(tokens, k)
    scratch = torch.empty(tokens, 2 * experts + groups)
    functions.route(
        ctypes.byref(described),
        logits.data_ptr(),
        logits.stride(0),
        tokens,
        scratch.data_ptr(),
        chosen.data_ptr(),
        weights.data_ptr(),
    )
    return chosen, weights


class Layer(Protocol):
    """What ``layers.Linear`` is: weights below each other, and what each wants done to x."""

    name: str
    weights: list[PackedWeight]
    bias: Tensor | None
    inputs: list[InputTransform | None] | None
    outputs: list[OutputTransform | None] | None


class Mixture(Protocol):
    """All experts of a layer, run together."""

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str, added: Tensor | None = None
    ) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden); chosen and weights (tokens, k), added like x."""


def together(gate_up: Sequence[Layer], down: Sequence[Layer]) -> Mixture | str:
    """What runs these experts in one call, or why they must run one by one."""
    weights = [weight for layer in gate_up for weight in layer.weights]
    first = next((buffer for weight in weights for buffer in weight.buffers.values()), None)
    native_ones = any(isinstance(weight, (NativeWeight, ColumnsWeight)) for weight in weights)
    if first is not None and not native_ones and runtime.runs_on(first.device):
        from lowbit.kernels.gpu.experts import GpuGroupedExperts

        return GpuGroupedExperts.of(gate_up, down)
    return GroupedExperts.of(gate_up, down)


@dataclass(frozen=True)
class GroupedExperts:
    """All experts of a layer as the native code knows them."""

    gate_up: _Matrices
    down: _Matrices
    count: int
    kept: tuple[object, ...]  # what the descriptions point at

    @staticmethod
    def of(gate_up: Sequence[Layer], down: Sequence[Layer]) -> GroupedExperts | str:
        """Or the reason why the experts must run one by one."""
        if _functions() is None:
            return "there is no native library"
        if not gate_up:
            return "there are no experts"
        described, kept = [], []
        for layers in (gate_up, down):
            found = _matrices(layers)
            if isinstance(found, str):
                return found
            described.append(found[0])
            kept.append(found[1])
        first, last = described
        if last.rows != first.columns or first.rows != 2 * last.columns:
            return f"{gate_up[0].name} and {down[0].name} do not belong together"
        return GroupedExperts(first, last, len(gate_up), tuple(kept))

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str, added: Tensor | None = None
    ) -> Tensor:
        """x float32 (tokens, hidden) -> (tokens, hidden); chosen and weights (tokens, k), added like x."""
        tokens, k = chosen.shape
        hidden: int = self.down.rows
        assert x.shape == (tokens, self.gate_up.columns) and x.dtype is torch.float32 and x.stride(1) == 1
        assert chosen.dtype is torch.int64 and chosen.is_contiguous() and weights.shape == chosen.shape
        assert weights.dtype is torch.float32 and weights.is_contiguous()
        assert added is None or (
            added.shape == (tokens, hidden) and added.dtype is torch.float32 and added.stride(1) == 1
        )
        out = torch.empty(tokens, hidden)
        described = ExpertsDescription(self.gate_up, self.down, self.count, activation_number(activation))
        functions = _functions()
        assert functions is not None, "of() asked"
        functions.mix(
            ctypes.byref(described),
            x.data_ptr(),
            x.stride(0),
            tokens,
            chosen.data_ptr(),
            weights.data_ptr(),
            k,
            None if added is None else added.data_ptr(),
            0 if added is None else added.stride(0),
            out.data_ptr(),
            hidden,
            first_prompt_row(tokens) if self._meet_many_tokens(k) else tokens,
        )
        return out

    def _meet_many_tokens(self, k: int) -> bool:
        """Whether an expert meets enough of a long prompt's tokens."""
        return PROMPT_TOKENS * k >= LEAST_EACH * self.count


def _matrices(layers: Sequence[Layer]) -> tuple[_Matrices, tuple[object, ...]] | str:
    """One matrix of every expert with what it points at, or why that cannot be."""
    for layer in layers:
        if reason := _refusal(layer):
            return reason
    shared = _shared_input(layers)
    parts: list[_Part] = []
    inputs: list[_Input] = [] if shared is None else [_input(shared, None)]
    first_part, first_input = [0], [0]
    shape = _shape(layers[0])
    for layer in layers:
        if _shape(layer) != shape:
            return f"{layer.name} is {_shape(layer)}, {layers[0].name} is {shape}"
        known: list[tuple[InputTransform | None, Tensor | None]] = []
        row = 0
        for weight, transform in zip(layer.weights, layer.inputs or [None] * len(layer.weights), strict=True):
            assert isinstance(weight, (NativeWeight, ColumnsWeight)), "nothing was refused"
            by_columns = ctypes.addressof(weight.description) if isinstance(weight, ColumnsWeight) else None
            codes = weight.codes if isinstance(weight, ColumnsWeight) else weight
            order, scale = weight.buffers.get("column_order"), weight.buffers.get("row_scale")
            place = 0 if shared is not None else -1
            if shared is None and (transform is not None or order is not None):
                place = next(
                    (i for i, (t, o) in enumerate(known) if t is transform and o is order), len(known)
                )
                if place == len(known):
                    known.append((transform, order))
                    inputs.append(_input(transform, order))
            scale_address = None if scale is None else scale.data_ptr()
            numbers = (row, weight.shape[0], place)
            parts.append(_Part(codes.address, by_columns, scale_address, *numbers))
            row += weight.shape[0]
        first_part.append(len(parts))
        first_input.append(len(inputs))
    arrays = (
        (_Part * len(parts))(*parts),
        (_INT * len(first_part))(*first_part),
        (_Input * max(len(inputs), 1))(*inputs),
        (_INT * len(first_input))(*first_input),
        (_POINTER * len(layers))(
            *(None if layer.bias is None else layer.bias.data_ptr() for layer in layers)
        ),
    )
    most = max(after - before for before, after in pairwise(first_input))
    described = _Matrices(*(ctypes.addressof(array) for array in arrays), *shape, most, shared is not None)
    used = tuple((tuple(layer.weights), layer.bias, layer.inputs) for layer in layers)
    return described, (*arrays, used)


def _shape(layer: Layer) -> tuple[int, int]:
    return sum(weight.shape[0] for weight in layer.weights), layer.weights[0].shape[1]


def _refusal(layer: Layer) -> str:
    """Why the layer cannot be described."""
    if not layer.weights:
        return f"{layer.name} holds no packed weight"
    for weight in layer.weights:
        if not isinstance(weight, (NativeWeight, ColumnsWeight)):
            return f"{layer.name} runs on the kernel {weight.kernel.name}"
        if weight.shape[1] != layer.weights[0].shape[1]:
            return f"{layer.name} has parts of {weight.shape[1]} and {layer.weights[0].shape[1]} columns"
    for transform in layer.inputs or ():
        if transform is not None and transform.native is None:
            return f"the inputs of {layer.name} are quantized in torch"
    if layer.outputs is not None:
        return f"{layer.name} changes its outputs"
    bias = layer.bias
    if bias is not None and not (bias.is_cpu and bias.dtype is torch.float32 and bias.is_contiguous()):
        return f"the bias of {layer.name} is {bias.dtype}"
    return ""


def _shared_input(layers: Sequence[Layer]) -> InputTransform | None:
    """The transform that all weights of all experts share, where it does to a row what it does alone."""
    found: InputTransform | None = None
    for layer in layers:
        for weight, transform in zip(layer.weights, layer.inputs or [None] * len(layer.weights), strict=True):
            if transform is None or "column_order" in weight.buffers:
                return None
            found = found or transform
            if not transform.same_as(found):
                return None
    return found if found is not None and found.native is not None and found.native.by_rows else None


def _input(transform: InputTransform | None, order: Tensor | None) -> _Input:
    if transform is None:
        return _Input(None, None, None if order is None else order.data_ptr(), 0)
    quantizer = transform.native
    assert quantizer is not None, "nothing was refused"
    return _Input(
        ctypes.addressof(quantizer.description),
        quantizer.buffers.static_scale.data_ptr()
        if transform.is_static and quantizer.buffers.static_scale is not None
        else None,
        None if order is None else order.data_ptr(),
        _FACTORS[quantizer.factors],
    )
