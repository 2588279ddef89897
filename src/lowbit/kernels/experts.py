"""Mixtures of experts: routing, and a batch's experts in one call, native (csrc/experts.cpp) or on a GPU.

The code knows an expert as two matrices of one or more packed weights each, with what happens to the rows
before (``InputTransform``, a rotation, a column order) and after (a rotation, row scales, biases). Rotations
are the weights' own (``transformed_kernel``). A token's result has the bits that its experts give one by one
(``layers.experts``), whoever else is in the batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.rounded_output import OutputTransform
from lowbit.kernels.step_plan import Operation
from lowbit.kernels.transformed_kernel import TransformedWeight

PROMPT_TOKENS = 512  # of a step, as --chunked-prefill-size is unless set
LEAST_EACH = 64  # tokens of an expert for which rounding its weights (``prompt_rows``) pays

# The numbers of csrc/experts.cpp.
RULES = ("softmax_top_k", "top_k_softmax", "group_softmax", "group_sigmoid")
_FACTORS = {"": 0, "row": 1, "one": 2}

_NATIVE = (NativeWeight, ColumnsWeight, TransformedWeight)
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
        *((name, _POINTER) for name in ("quantizer", "static_factor", "column_order", "rotation")),
        ("rotated", _LONG),
        ("columns", _LONG),
        ("factors", _INT),
    )


class _Part(ctypes.Structure):
    """lowbit_expert_part."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "by_columns", "row_scale", "rotation", "places")),
        *((name, _LONG) for name in ("first", "rows", "input", "skip", "whole", "apart")),
    )


class _Matrices(ctypes.Structure):
    """lowbit_expert_matrices."""

    _fields_ = (
        *((name, _POINTER) for name in ("parts", "first_part", "inputs", "first_input", "biases")),
        *((name, _LONG) for name in ("rows", "columns", "most_columns", "most_apart")),
        *((name, _INT) for name in ("most_inputs", "most_parts", "shared")),
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
    order: Tensor | None
    outputs: list[OutputTransform | None] | None

    @property
    def gathers(self) -> bool:
        """Whether ranks tell each other its products."""


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
    native_ones = any(isinstance(weight, _NATIVE) for weight in weights)
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


@dataclass
class _Described:
    """What the experts' layers come to, layer by layer; ``kept``: tensors that it points at."""

    parts: list[_Part] = field(default_factory=list)
    inputs: list[_Input] = field(default_factory=list)
    first_part: list[int] = field(default_factory=lambda: [0])
    first_input: list[int] = field(default_factory=lambda: [0])
    biases: list[Tensor | None] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    most_apart: int = 0

    def add(self, layer: Layer, shared: bool) -> None:
        """``shared``: all experts' rows are quantized together, as the first input says."""
        known: list[tuple[InputTransform | None, Tensor | None, Rotator | None]] = []
        row = apart = 0
        places = _places(layer)
        for weight, transform in zip(layer.weights, layer.inputs or [None] * len(layer.weights), strict=True):
            turned = weight if isinstance(weight, TransformedWeight) else None
            inner = weight if turned is None else turned.tiles
            order, scale = inner.buffers.get("column_order"), inner.buffers.get("row_scale")
            before = None if turned is None else turned.before
            place = 0 if shared else -1
            if not shared and any(each is not None for each in (transform, order, before)):
                given = (transform, order, before)
                place = next((i for i, one in enumerate(known) if _same_objects(one, given)), len(known))
                if place == len(known):
                    known.append(given)
                    self.inputs.append(_input(weight, transform))
            whole, skip = inner.shape[0], 0 if turned is None else turned.skip
            moves = turned is not None and (whole != weight.shape[0] or places is not None)
            self.parts.append(
                _Part(
                    _codes(weight).address,
                    ctypes.addressof(weight.description) if isinstance(weight, ColumnsWeight) else None,
                    None if scale is None else scale.data_ptr(),
                    None if turned is None else _native(turned.after),
                    None if places is None else places[row:].data_ptr(),
                    *(row, weight.shape[0], place, skip, whole, apart if moves else -1),
                )
            )
            row += weight.shape[0]
            apart += whole * moves
        self.kept += [] if places is None else [places]
        self.first_part.append(len(self.parts))
        self.first_input.append(len(self.inputs))
        self.most_apart = max(self.most_apart, apart)
        bias = layer.bias
        # One by one it is added before the rows are put in order.
        self.biases.append(bias if bias is None or layer.order is None else bias[layer.order])


def _matrices(layers: Sequence[Layer]) -> tuple[_Matrices, tuple[object, ...]] | str:
    """One matrix of every expert with what it points at, or why that cannot be."""
    for layer in layers:
        if reason := _refusal(layer):
            return reason
    shape = _shape(layers[0])
    for layer in layers:
        if _shape(layer) != shape:
            return f"{layer.name} is {_shape(layer)}, {layers[0].name} is {shape}"
    shared, found = _shared_input(layers), _Described()
    if shared is not None:
        found.inputs.append(_input(layers[0].weights[0], shared))
    for layer in layers:
        found.add(layer, shared is not None)
    arrays = (
        (_Part * len(found.parts))(*found.parts),
        (_INT * len(found.first_part))(*found.first_part),
        (_Input * max(len(found.inputs), 1))(*found.inputs),
        (_INT * len(found.first_input))(*found.first_input),
        (_POINTER * len(layers))(*(None if bias is None else bias.data_ptr() for bias in found.biases)),
    )
    most_inputs, most_parts = (
        max(after - before for before, after in pairwise(firsts))
        for firsts in (found.first_input, found.first_part)
    )
    rotates = any(part.rotation for part in found.parts)
    described = _Matrices(
        *(ctypes.addressof(array) for array in arrays),
        *shape,
        max([shape[1], *(max(each.rotated, each.columns) for each in found.inputs)]),
        found.most_apart,
        most_inputs,
        most_parts if rotates else 0,
        shared is not None,
    )
    used = tuple((tuple(layer.weights), layer.inputs) for layer in layers)
    return described, (*arrays, found.biases, found.kept, used)


def _places(layer: Layer) -> Tensor | None:
    """int64 (rows,): which output of the layer each row is; None where they lie in order."""
    if layer.order is None:
        return None
    return torch.empty_like(layer.order).scatter_(0, layer.order, torch.arange(len(layer.order)))


def _codes(weight: PackedWeight) -> NativeWeight:
    """What native code multiplies with."""
    assert isinstance(weight, _NATIVE), "nothing was refused"
    if isinstance(weight, TransformedWeight):
        return weight.tiles
    return weight.codes if isinstance(weight, ColumnsWeight) else weight


def _native(rotator: Rotator | None) -> int | None:
    if rotator is None:
        return None
    assert rotator.native is not None, "nothing was refused"
    return ctypes.addressof(rotator.native)


def _same_objects(some: tuple[object, ...], others: tuple[object, ...]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))


def _shape(layer: Layer) -> tuple[int, int]:
    return sum(weight.shape[0] for weight in layer.weights), layer.weights[0].shape[1]


def _refusal(layer: Layer) -> str:
    """Why the layer cannot be described."""
    if not layer.weights:
        return f"{layer.name} holds no packed weight"
    for weight in layer.weights:
        if not isinstance(weight, _NATIVE):
            return f"{layer.name} runs on the kernel {weight.kernel.name}"
        if isinstance(weight, TransformedWeight):
            if weight.after is None or layer.gathers:
                return f"ranks gather the products of {layer.name}"
        elif layer.order is not None:
            return f"{layer.name} has outputs in another order"
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
            turned = isinstance(weight, TransformedWeight)  # which has transforms of its own after that
            if transform is None or turned or "column_order" in weight.buffers:
                return None
            found = found or transform
            if not transform.same_as(found):
                return None
    return found if found is not None and found.native is not None and found.native.by_rows else None


def _input(weight: PackedWeight, transform: InputTransform | None) -> _Input:
    met, rotated, rotation = weight, weight.shape[1], None
    if isinstance(weight, TransformedWeight):
        met, rotated, rotation = weight.tiles, weight.rotated, _native(weight.before)
    order = met.buffers.get("column_order")
    quantizer = None if transform is None else transform.native
    assert quantizer is not None or transform is None, "nothing was refused"
    static = None
    if quantizer is not None and transform is not None and transform.is_static:
        static = quantizer.buffers.static_scale
    return _Input(
        None if quantizer is None else ctypes.addressof(quantizer.description),
        None if static is None else static.data_ptr(),
        None if order is None else order.data_ptr(),
        rotation,
        rotated,
        met.shape[1],
        0 if quantizer is None else _FACTORS[quantizer.factors],
    )
