"""Loader: the ``WeightLoader`` that reads, quantizes where that is asked for, fuses and packs.

A module is read in canonical form, equal parts are fused and packed for the chosen kernel, and the canonical
form is dropped before the next module is read: peak memory is the packed model plus one module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.checkpoint.tensor_data import TensorData
from lowbit.formats import InputRule
from lowbit.formats.kv_scales import KvScales
from lowbit.kernels import PackedWeight, choose
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationStates
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.loading.asker import Asker
from lowbit.loading.names import Placed, row_order
from lowbit.loading.opened import Opened, Target
from lowbit.loading.samples import Samples
from lowbit.loading.self_check import check_packed
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.quantized_tensor import QuantizedTensor, concatenate
from lowbit.numerics.scheme import Scheme

_log = logging.getLogger("lowbit")
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what


@dataclass
class ReadPart:
    """One stored module read: its weight, bias and what it wants of its input."""

    weight: QuantizedTensor
    bias: Tensor | None
    transform: InputTransform | None
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.weight.shape[-2]


class Loader(Asker):
    """``WeightLoader`` that reads and packs."""

    def __init__(
        self,
        opened: Opened,
        target: Target,
        data: TensorData,
        kv_scales: KvScales,
        on_progress: Progress | None = None,
        samples: Samples | None = None,
    ) -> None:
        super().__init__(opened, target)
        self.data = data
        self.samples = samples
        self.tied_head = opened.config.tied_head
        self.on_progress = on_progress
        self.done = 0
        self.kernels: set[str] = set()
        self.packed_bytes = 0
        self.spans_tokens = False
        self.states = ActivationStates()
        self._said_unused = False
        self._kv_scales = kv_scales

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """Read the parts, fuse neighbours that allow it, pack."""
        return self._linear(name, self.placed(name, parts))

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Read and pack one expert after another."""
        gate_up, down = [], []
        for number in range(spec.count):
            first, last = self.placed_expert(name, spec, number)
            gate_up.append(self._linear(f"{name}.{number}.gate_up_proj", first))
            down.append(self._linear(f"{name}.{number}.down_proj", last))
        return Experts(name, gate_up, down)

    def embedding(self, part: Part) -> Embedding:
        """Read and pack the embedding matrix."""
        [place] = self.placed(part.name, [part])
        weight = self._read(place).weight
        packed = self._pack(weight)
        if self.samples is not None and self.tied_head:
            self.samples.note(weight, packed, None)
        return Embedding(packed, self.activation_dtype)

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """The dequantized matrix itself, or (stacked, out, in) of them."""
        found = []
        for place in self.placed_stack(part, stacked):
            read = self._read(place, as_stored=True)
            matrix = read.weight.dequantize().to(self.device)
            if read.transform is not None and read.transform.multiplier is not None:
                matrix = matrix * read.transform.multiplier  # what x would have been multiplied by
            found.append(matrix)
        return torch.stack(found) if stacked else found[0]

    def vector(self, name: str, size: int) -> Tensor:
        """A float32 copy of a small tensor."""
        stored = self.check_vector(name, size)
        return self.data.tensor(stored).to(device=self.device, dtype=torch.float32, copy=True)

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """What the checkpoint (or the file that was passed) says K and V are divided by in the cache."""
        found = self._kv_scales.of_layer(self.names, attention, layer, self.data)
        if found is None:
            return 1.0, 1.0
        if not self.cache_dtype.takes_scales and found != (1.0, 1.0) and not self._said_unused:
            self._said_unused = True
            _log.warning("lowbit: KV scales are only used with --kv-cache-dtype fp8_e4m3")
        k, v = (stored.name == "fp8_e4m3" for stored in (self.cache_dtype.k, self.cache_dtype.v))
        return found[0] if k else 1.0, found[1] if v else 1.0

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """e4m3 with the layer's scales where they are known; each token's own otherwise."""
        known = self._kv_scales.of_layer(self.names, attention, layer, self.data) is not None
        return self.cache_dtype.with_static_scales() if known else self.cache_dtype

    def _linear(self, name: str, places: list[Placed]) -> Linear:
        read = [self._read(place) for place in places]
        bias = self._bias(read)
        weights: list[PackedWeight] = []
        inputs: list[InputTransform | None] = []
        with_state: dict[int, InputTransform] = {}
        for weight, transform in _fused(read):
            weights.append(self._pack(weight))
            if transform is not None and transform.scheme is not None and transform.scheme.delay is not None:
                if id(transform) not in with_state:
                    state = self.states.add(name, transform.scheme, self.device)
                    with_state[id(transform)] = replace(transform, state=state)
                transform = with_state[id(transform)]
            inputs.append(transform)
            if transform is not None and transform.scheme is not None and transform.scheme.spans_tokens:
                self.spans_tokens = True
            if self.samples is not None:
                self.samples.note(weight, weights[-1], transform)
        return Linear(name, weights, bias, inputs)

    def _read(self, place: Placed, as_stored: bool = False) -> ReadPart:
        stored = self.form.read(place.module, self.data)
        weight, bias, rule = stored.weight, stored.bias, stored.input
        order = row_order(place, self.header)
        if order is not None:
            weight = weight.permute_rows(order)
            bias = None if bias is None else bias[order]
        if self.online is not None and not as_stored and (decision := self.decide(place)) is not None:
            made = self.online.quantize(decision, weight)
            weight = made.weight
            rule = None if made.static_scale is None else InputRule(static_scale=made.static_scale)
        transform = self._transform(weight.scheme, rule)
        weight = self._cast(weight)
        if self.on_progress is not None:
            self.done += self.stored_nbytes(place)
            what = "loading" if self.online is None else "quantizing"
            self.on_progress(self.done, self.header.nbytes, what)
        return ReadPart(weight, bias, transform)

    def _transform(self, scheme: Scheme, rule: InputRule | None) -> InputTransform | None:
        if scheme.activation is None and rule is None:
            return None
        rule = rule or InputRule()

        def owned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, torch.float32, copy=True)

        return InputTransform(
            scheme.activation, owned(rule.multiplier), owned(rule.static_scale), owned(rule.static_zero)
        )

    def _cast(self, weight: QuantizedTensor) -> QuantizedTensor:
        scheme = self.as_run(weight.scheme)
        if scheme is weight.scheme:
            return weight
        if scheme.is_dense:
            return replace(weight, scheme=scheme, codes=weight.codes.to(scheme.weight.dtype))
        return replace(weight, scheme=scheme)

    def _pack(self, weight: QuantizedTensor) -> PackedWeight:
        kernel = choose(weight.scheme, weight.shape, self.device).kernel
        self.kernels.add(kernel.name)
        packed = kernel.pack(weight, self.device)
        check_packed(weight, packed)
        self.packed_bytes += packed.nbytes
        return packed

    def _bias(self, read: list[ReadPart]) -> Tensor | None:
        """The parts' biases below each other, zeros where a part has none."""
        if all(part.bias is None for part in read):
            return None
        rows = [torch.zeros(part.rows) if part.bias is None else part.bias.float() for part in read]
        return torch.cat(rows).to(device=self.device, dtype=self.activation_dtype)


def _fused(read: list[ReadPart]) -> Iterator[tuple[QuantizedTensor, InputTransform | None]]:
    """Neighbours that are alike joined, the rest by themselves; ``read`` is emptied on the way.

    Transforms that do the same become one object, so that a Linear runs them once.
    """
    inputs: list[InputTransform] = []
    while read:
        first = read.pop(0)
        transform = first.transform
        if transform is not None:
            transform = next((known for known in inputs if known.same_as(transform)), transform)
            inputs.append(transform)
        run = [first.weight]
        while read and _alike(transform, read[0].transform):
            joined = concatenate([*run, read[0].weight])
            if joined is None:
                break
            run = [joined]
            read.pop(0)
        yield run[0], transform


def _alike(a: InputTransform | None, b: InputTransform | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.same_as(b)
