"""All experts of a layer on the device: ``layers.experts`` in five launches, whatever they choose.

Sorting, gate and up with the activation, down, and the sum over a token's experts; quantizing inputs comes
between. The weights of all experts lie in one buffer of each kind, of which each expert's own Linear has a
view. Nothing waits for the device and all grids follow from shapes alone, so that a step can be captured.

An input that all experts quantize alike is quantized once, before it is handed out; where scales or
multipliers are an expert's own, every pair of token and expert is quantized by itself. A rotation that all
have comes before, in a launch. Where inputs and weights are codes of 8 bits, 8-bit tensor cores multiply them
(``expert_eight_bit``). Other codes are multiplied in bfloat16, which holds them exactly, and scales meet
float32 sums. Trellises, codebooks, lattices and SpQR's codes meet x in float16, and have more launches
(``CodedStack``).

Graphs, speed and memory have not been seen on a GPU: the kernels are proven in Triton's interpreter, and
compiled for compute capabilities 8.0 and 9.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.kernels.activation_quant import InputTransform, grouped_codes
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.experts import Layer
from lowbit.kernels.gpu import expert_eight_bit
from lowbit.kernels.gpu.eight_bit import EightBitWeight
from lowbit.kernels.gpu.expert_eight_bit import stacked
from lowbit.kernels.gpu.expert_products import Rows, Stack, block_rows, multiply
from lowbit.kernels.gpu.expert_rows import SortedPairs, mix, sort_pairs
from lowbit.kernels.gpu.halves import HalvesStack
from lowbit.kernels.gpu.lattice import LatticeStack
from lowbit.kernels.gpu.layer import meet, operand
from lowbit.kernels.gpu.row_vectors import RowVectorsStack
from lowbit.kernels.gpu.trellis import TrellisStack
from lowbit.kernels.gpu.vectors import VectorsStack
from lowbit.kernels.gpu.weight_layout import Layout, layout_of
from lowbit.kernels.rotation import Rotator, same

# Whose codes meet x as float16.
_CODED = ("gpu_trellis", "gpu_vectors", "gpu_row_vectors", "gpu_lattice", "gpu_halves")
_ORDERED = ("gpu_row_vectors", "gpu_halves")  # of these in an order of each expert's own
CodedStack = TrellisStack | VectorsStack | RowVectorsStack | LatticeStack | HalvesStack
MOST_BETWEEN = 1 << 28  # numbers of pairs that are kept between the products; more tokens go in turns


@dataclass(frozen=True, eq=False)
class _Input:
    """What happens to the rows of one weight of all experts.

    ``shared``: every expert does the same. Else the tensors of ``transform`` have one row for each expert.
    ``rotation``: of all experts, before ``transform``, which has none.
    """

    transform: InputTransform
    shared: bool
    rotation: Rotator | None = None

    def __call__(self, x: Tensor, divisor: int, chosen: Tensor, tile: int) -> Rows:
        """x as row ``pair // divisor`` of each pair; ``chosen``: int64 (pairs,).

        ``tile``: columns that the product gives one scale at least; 0: it takes none.
        """
        transform, scheme, dtype = self.transform, self.transform.scheme, x.dtype
        x = self._rotated(x)
        if scheme is None and transform.multiplier is None:
            return Rows(x, divisor)
        if not self.shared:
            x = x if divisor == 1 else x.repeat_interleave(divisor, 0)
            divisor = 1
            transform = _of_pairs(transform, chosen)
        if scheme is None or not scheme.block[1]:
            changed, factor = transform(x) if self.shared else transform.in_torch(x)
            # Codes lose nothing in bfloat16.
            changed = changed.to(dtype if scheme is None else torch.bfloat16)
            return Rows(changed, divisor, None if factor is None else factor.float().contiguous())
        group = scheme.block[1]
        # Codes times powers of two are bfloat16.
        exact = scheme.scale.name == "e8m0" and transform.static_scale is None
        if exact or not tile or group % tile:
            changed, _ = transform(x) if self.shared else transform.in_torch(x)
            return Rows(changed.to(torch.bfloat16 if exact else dtype), divisor)
        if self.shared and transform.gpu is not None and scheme.number_format.dtype is not None:
            found = transform.gpu.codes(x)
            return Rows(found.codes.bfloat16(), divisor, None, found.scales, group)
        if transform.multiplier is not None:
            x = x * transform.multiplier
        if scheme.input == "bf16":
            x = x.bfloat16()
        codes, scales = grouped_codes(x, scheme, transform.static_scale)
        codes = codes.bfloat16().flatten(-2)[:, : x.shape[1]]
        return Rows(codes, divisor, None, scales.squeeze(-1).T, group)

    def codes(self, x: Tensor, divisor: int, chosen: Tensor) -> Rows:
        """The same as codes of 8 bits, for weights of as many: where ``eight_bit`` said they can be."""
        transform, scheme = self.transform, self.transform.scheme
        assert scheme is not None, "its codes are asked for"
        x = self._rotated(x)
        if self.shared:
            assert transform.gpu is not None, "asked before"
            found = transform.gpu.codes(x)
            group = transform.gpu.group
            if group:
                return Rows(found.codes, divisor, None, found.scales, group)
            return Rows(found.codes, divisor, found.scales, zeros=found.zeros)
        x = x if divisor == 1 else x.repeat_interleave(divisor, 0)
        changed, factor = _of_pairs(transform, chosen).in_torch(x)
        assert factor is not None, "a scale of each pair"
        # Codes cannot all say NaN: the scale does.
        factor = torch.where(changed.isnan().any(1, keepdim=True), torch.nan, factor.float())
        dtype = torch.int8 if scheme.number_format.is_integer else scheme.number_format.dtype
        assert dtype is not None, "a format of 8 bits"
        return Rows(changed.nan_to_num().to(dtype), 1, factor.flatten())

    def _rotated(self, x: Tensor) -> Tensor:
        """x as it is quantized: float32 where it was rotated, unless nothing follows."""
        if self.rotation is None:
            return x
        last = self.transform.scheme is None and self.transform.multiplier is None
        return self.rotation.rotated(x, x.dtype if last else torch.float32)

    def eight_bit(self, layers: Sequence[Layer], number: int, codes: Tensor) -> EightBitWeight | None:
        """A weight of all experts, whose codes these are, for ``codes`` of x; None where either is not."""
        transform, scheme = self.transform, self.transform.scheme
        if scheme is None or scheme.number_format.bits != 8:
            return None
        if self.shared:
            if transform.gpu is None:
                return None
            group, has_zeros = transform.gpu.group, transform.gpu.has_zeros
            zeros = transform.gpu.static_zero
        else:
            if scheme.block[1] or not scheme.symmetric or transform.static_zero is not None:
                return None
            group, has_zeros, zeros = 0, False, None
        weights = [layer.weights[number] for layer in layers]
        if not all(meet(weight, scheme, zeros) for weight in weights):
            return None
        found = [operand(weight, group, has_zeros) for weight in weights]
        known = [one for one in found if one is not None]
        return stacked(known, codes) if len(known) == len(found) else None


def _chosen(of_experts: Tensor, chosen: Tensor) -> Tensor:
    """Those of each pair's expert; of the nearest where a router gone wrong names one that is none."""
    return of_experts.index_select(0, chosen.clamp(0, len(of_experts) - 1))


def _of_pairs(transform: InputTransform, chosen: Tensor) -> InputTransform:
    """Each pair's own multiplier and scales, from those of all experts."""
    grouped = transform.scheme is not None and transform.scheme.block[1] > 0

    def own(numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else _chosen(numbers, chosen).view(len(chosen), 1, *[1] * grouped)

    return replace(
        transform,
        multiplier=None if transform.multiplier is None else _chosen(transform.multiplier, chosen),
        static_scale=own(transform.static_scale),
        static_zero=own(transform.static_zero),
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """One weight of every expert, its rows from ``first`` on. ``bias``: float32 (experts, rows).

    ``eight_bit``: the weight for 8-bit codes of x, where both can be.
    """

    stack: Stack | CodedStack
    bias: Tensor | None
    input: _Input | None
    first: int
    eight_bit: EightBitWeight | None = None

    @property
    def tile(self) -> int:
        """See ``_Input``: an order of columns mixes their groups."""
        if not isinstance(self.stack, Stack) or self.stack.layout is None or self.stack.order is not None:
            return 0
        return self.stack.layout.tile

    def rows(self, x: Tensor, divisor: int, chosen: Tensor) -> Rows:
        """What the product is given of x."""
        if self.input is None:
            return Rows(x, divisor)
        if self.eight_bit is not None:
            return self.input.codes(x, divisor, chosen)
        return self.input(x, divisor, chosen, self.tile)


@dataclass(frozen=True, eq=False)
class _Matrix:
    """One matrix of every expert."""

    parts: tuple[_Part, ...]
    rows: int
    columns: int

    def __call__(
        self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, activation: str | None = None
    ) -> Tensor:
        """(pairs, rows), or gated (pairs, rows / 2)."""
        pairs = len(chosen)
        given: dict[tuple[int, int, bool], Rows] = {}
        fused = activation is not None and len(self.parts) == 1 and self.parts[0].stack.gates
        width = self.rows // 2 if fused else self.rows
        out = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
        for part in self.parts:
            own = out if fused else out[:, part.first : part.first + part.stack.shape[0]]
            if not isinstance(part.stack, Stack):
                part.stack.multiply(x, divisor, chosen, sorted_, own)
                if part.bias is not None:
                    own += _chosen(part.bias, chosen)
                continue
            eight, within = part.eight_bit, activation if fused else None
            key = (id(part.input), part.tile, eight is not None)
            if key not in given:
                given[key] = part.rows(x, divisor, chosen)
            if eight is not None:
                expert_eight_bit.multiply(eight, given[key], sorted_, part.bias, within, own)
            else:
                multiply(part.stack, given[key], sorted_, part.bias, within, own)
        return out if fused or activation is None else gated_activation(out, activation)


@dataclass(frozen=True, eq=False)
class GpuGroupedExperts:
    """See the module docstring."""

    gate_up: _Matrix
    down: _Matrix
    count: int

    @staticmethod
    def of(gate_up: Sequence[Layer], down: Sequence[Layer]) -> GpuGroupedExperts | str:
        """Or the reason why the experts must run one by one. Weights become views of their stacks."""
        if not gate_up:
            return "there are no experts"
        for layers in (gate_up, down):
            if reason := _refusal(layers):
                return reason
        (outer, hidden), (rows, inner) = _shape(gate_up[0]), _shape(down[0])
        if outer != 2 * inner or rows != hidden:
            return f"{gate_up[0].name} and {down[0].name} do not belong together"
        return GpuGroupedExperts(_matrix(gate_up), _matrix(down), len(gate_up))

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str, added: Tensor | None = None
    ) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden) like it; chosen and weights (tokens, k), added like x."""
        tokens, k = chosen.shape
        out = torch.empty(tokens, self.down.rows, dtype=x.dtype, device=x.device)
        step = max(MOST_BETWEEN // (k * max(self.down.rows, self.gate_up.rows)), 1)
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            more = None if added is None else added[part]
            self._some(x[part], chosen[part], weights[part], activation, more, out[part])
        return out

    def _some(
        self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str, added: Tensor | None, out: Tensor
    ) -> None:
        pairs = chosen.flatten()
        parts = (*self.gate_up.parts, *self.down.parts)
        most = min(part.stack.most_rows for part in parts)
        codes = all(part.eight_bit is not None for part in parts)
        dtype = torch.bfloat16 if codes else x.dtype
        sorted_ = sort_pairs(chosen, self.count, block_rows(len(pairs), self.count, dtype, most))
        inner = self.gate_up(x, chosen.shape[1], pairs, sorted_, activation)
        mix(self.down(inner, 1, pairs, sorted_), chosen, weights, added, out)


def _shape(layer: Layer) -> tuple[int, int]:
    return sum(weight.shape[0] for weight in layer.weights), layer.weights[0].shape[1]


def _refusal(layers: Sequence[Layer]) -> str:
    """Why the layers cannot be one matrix; "" where they can."""
    first = layers[0]
    for layer in layers:
        if not layer.weights:
            return f"{layer.name} holds no packed weight"
        for weight in layer.weights:
            if weight.kernel.name not in ("gpu_blocks", "gpu_dense", *_CODED):
                return f"{layer.name} runs on the kernel {weight.kernel.name}"
            ordered = "column_order" in weight.buffers and weight.kernel.name not in _ORDERED
            if weight.kernel.name in _CODED and (layer.inputs or ordered):
                return f"{layer.name} has codes whose inputs are changed or in another order"
        if layer.outputs is not None:
            return f"{layer.name} changes its outputs"
        if len(layer.weights) != len(first.weights):
            return f"{layer.name} has {len(layer.weights)} parts, {first.name} has {len(first.weights)}"
        for weight, other in zip(layer.weights, first.weights, strict=True):
            if (weight.scheme, weight.shape) != (other.scheme, other.shape):
                mine, others = (f"{w.scheme} of {w.shape}" for w in (weight, other))
                return f"{layer.name} is {mine}, {first.name} is {others}"
            if set(weight.buffers) != set(other.buffers):
                return f"{layer.name} is packed otherwise than {first.name}"
    for part in range(len(first.weights)):
        transforms = [layer.inputs[part] if layer.inputs else None for layer in layers]
        if reason := _unlike(transforms):
            return f"the inputs of {first.name}: {reason}"
    return ""


def _unlike(transforms: list[InputTransform | None]) -> str:
    """Why transforms cannot run for all experts at once."""
    first = transforms[0]
    for other in transforms:
        if (first is None) != (other is None):
            return "some experts quantize theirs, others do not"
        if first is None or other is None:
            continue
        if other.scheme is not None and other.scheme.depends_on_batch:
            return other.scheme.depends_on_batch
        if not same(other.rotation, first.rotation):
            return "experts rotate theirs in different ways"
        kinds = ("multiplier", "static_scale", "static_zero")
        alike = all((getattr(first, kind) is None) == (getattr(other, kind) is None) for kind in kinds)
        if other.scheme != first.scheme or not alike:
            return "experts quantize theirs in different ways"
    return ""


def _matrix(layers: Sequence[Layer]) -> _Matrix:
    rows, columns = _shape(layers[0])
    parts: list[_Part] = []
    inputs: list[tuple[list[InputTransform | None], _Input | None]] = []
    biases = _biases(layers)
    first = 0
    for number, weight in enumerate(layers[0].weights):
        transforms = [layer.inputs[number] if layer.inputs else None for layer in layers]
        known = next((found for others, found in inputs if _identical(transforms, others)), None)
        if known is None:
            known = _input(transforms)
            inputs.append((transforms, known))
        last = first + weight.shape[0]
        bias = None if biases is None else biases[:, first:last].contiguous()
        stack = _stack(layers, number)
        codes = stack.buffers.get("codes") if isinstance(stack, Stack) else None
        eight = None if codes is None or known is None else known.eight_bit(layers, number, codes)
        parts.append(_Part(stack, bias, known, first, eight))
        first = last
    return _Matrix(tuple(parts), rows, columns)


def _identical(transforms: list[InputTransform | None], others: list[InputTransform | None]) -> bool:
    return all(one is other for one, other in zip(transforms, others, strict=True))


def _biases(layers: Sequence[Layer]) -> Tensor | None:
    """float32 (experts, rows); experts that have none add nothing."""
    found = [layer.bias for layer in layers]
    some = next((bias for bias in found if bias is not None), None)
    if some is None:
        return None
    return torch.stack(
        [torch.zeros_like(some, dtype=torch.float32) if b is None else b.float() for b in found]
    )


def _input(transforms: list[InputTransform | None]) -> _Input | None:
    first = transforms[0]
    if first is None:
        return None
    rotation = first.rotation  # everybody's
    known = [replace(transform, rotation=None) for transform in transforms if transform is not None]
    first = known[0]
    if all(transform.same_as(first) for transform in known):
        return _Input(first, True, rotation)

    def rows(kind: str) -> Tensor | None:
        found = [getattr(transform, kind) for transform in known]
        return None if found[0] is None else torch.stack([tensor.float().flatten() for tensor in found])

    stacked = replace(
        first,
        multiplier=rows("multiplier"),
        static_scale=rows("static_scale"),
        static_zero=rows("static_zero"),
    )
    return _Input(stacked, False, rotation)


def _stack(layers: Sequence[Layer], number: int) -> Stack | CodedStack:
    """One buffer of each kind for all experts, one kind after another, so that little is there twice."""
    first = layers[0].weights[number]
    layout: Layout | None = None
    if not first.scheme.is_dense and first.kernel.name not in _CODED:
        found = layout_of(first.scheme, first.shape)
        assert isinstance(found, Layout), "its kernel packed it"
        layout = found
    buffers: dict[str, Tensor] = {}
    for name in first.buffers:
        own = [layer.weights[number].buffers[name] for layer in layers]
        if first.kernel.name == "gpu_halves" and name in HalvesStack.of_any_length:
            buffers[name] = torch.cat(own)
            views = buffers[name].split([len(buffer) for buffer in own])
        else:
            # Not every float8 type can be stacked.
            plain = torch.uint8 if own[0].itemsize == 1 else own[0].dtype
            buffers[name] = torch.stack([buffer.view(plain) for buffer in own]).view(own[0].dtype)
            views = buffers[name].unbind()
        del own
        for layer, view in zip(layers, views, strict=True):
            weight = layer.weights[number]
            there = weight.buffers | {name: view}
            layer.weights[number] = weight.kernel.restore(weight.scheme, weight.shape, there, weight.origin)
    rows, columns = first.shape
    if first.kernel.name == "gpu_trellis":
        return TrellisStack.of(first.scheme, (rows, columns), buffers)
    weights = [layer.weights[number] for layer in layers]
    match first.kernel.name:
        case "gpu_vectors":
            return VectorsStack.of(weights, buffers)
        case "gpu_row_vectors":
            return RowVectorsStack.of(weights, buffers)
        case "gpu_lattice":
            return LatticeStack.of(weights, buffers)
        case "gpu_halves":
            return HalvesStack.of(weights, buffers)
    order = buffers.pop("column_order", None)
    table = buffers.get("table")
    split = table is not None and bool((table != table.bfloat16().float()).any())
    return Stack((rows, columns), layout, buffers, order, split)
