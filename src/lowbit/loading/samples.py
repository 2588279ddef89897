"""Samples: a few rows of every kind of layer a model has, for ``kernels.timing``.

They are cut from the weights as these are loaded and packed, so that what is timed has the model's own
numbers in its own layout, also where the whole layer would take too long. A kind costs a few MiB until the
model is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.kernels import LinearKernel, PackedWeight
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.settled import settled
from lowbit.kernels.timing import LayerSample, sample_rows
from lowbit.layers.linear import Linear
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


class Samples:
    """One sample for each (kernel, scheme, shape), and how many layers there are of it."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str, tuple[int, ...]], LayerSample] = {}
        self._counts: dict[LayerSample, int] = {}

    def note(
        self,
        weight: QuantizedTensor | None,
        packed: PackedWeight,
        transform: InputTransform | None,
        copies: bool = False,
    ) -> None:
        """A weight that the model multiplies with, packed, and what is done to its inputs.

        ``weight`` None: it was packed at an earlier start. It is taken apart if somebody times it.
        ``copies``: whether it might be a bf16 copy (``cpu_dequantized``) and is none.
        """
        scheme = str(with_inputs(packed.scheme, transform))
        key = (packed.kernel.name, scheme, packed.shape)
        if key not in self._samples:
            rows = _timed_rows(packed.kernel, packed.scheme, packed.shape, _device(packed))
            run: Callable[[Tensor], Tensor]
            if weight is None:
                run = _Unpacked(packed, rows, transform)
            else:
                run = _layer(_first_rows(weight, packed, rows), transform)
            self._samples[key] = _sample(packed, packed.shape, rows, run, transform, copies)
        sample = self._samples[key]
        self._counts[sample] = self._counts.get(sample, 0) + 1

    @property
    def counts(self) -> dict[LayerSample, int]:
        """How many layers of each kind were noted."""
        return self._counts


def with_inputs(scheme: Scheme, transform: InputTransform | None) -> Scheme:
    """A packed weight's scheme with what is done to its layer's inputs."""
    return replace(scheme, activation=None if transform is None else transform.scheme)


def sample_of(
    weight: QuantizedTensor, kernel: LinearKernel, transform: InputTransform | None, device: torch.device
) -> LayerSample:
    """Some rows of a weight as they would run on a kernel that takes it."""
    rows = _timed_rows(kernel, weight.scheme, weight.shape, device)
    packed = kernel.pack(weight if rows == weight.shape[-2] else weight.rows(0, rows, ragged=True), device)
    return _sample(packed, weight.shape, rows, _layer(packed, transform), transform, False)


def _sample(
    packed: PackedWeight,
    shape: tuple[int, ...],
    rows: int,
    run: Callable[[Tensor], Tensor],
    transform: InputTransform | None,
    copies: bool,
) -> LayerSample:
    scheme = with_inputs(packed.scheme, transform)
    as_they_are = scheme.activation is None
    plain, copies = scheme.is_dense and as_they_are, copies and as_they_are
    whole = (shape[-2], shape[-1])
    return LayerSample(packed.kernel.name, str(scheme), whole, rows, run, plain, copies)


def _layer(packed: PackedWeight, transform: InputTransform | None) -> Callable[[Tensor], Tensor]:
    layer, inputs = Linear("timing", [packed], None, [settled(packed, transform)]), packed.inputs
    return layer if inputs is None else lambda x: layer(x.to(inputs))


class _Unpacked:
    """A layer of the first rows of a packed weight, made when it is first called."""

    def __init__(self, packed: PackedWeight, rows: int, transform: InputTransform | None) -> None:
        self._packed = packed
        self._rows = rows
        self._transform = transform
        self._layer: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._layer is None:
            weight = self._packed.kernel.unpack(self._packed)
            self._layer = _layer(_first_rows(weight, self._packed, self._rows), self._transform)
        return self._layer(x)


def _timed_rows(kernel: LinearKernel, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> int:
    """So many rows as suffice, or all where the kernel would not take those, or blocks be left with a few."""
    whole = scheme.scattered or scheme.weight.lattice is not None
    rows = shape[-2] if whole else sample_rows(shape)
    return rows if kernel.refuses(scheme, (rows, shape[-1]), device) is None else shape[-2]


def _first_rows(weight: QuantizedTensor, packed: PackedWeight, rows: int) -> PackedWeight:
    if rows == packed.shape[-2]:
        return packed
    return packed.kernel.pack(weight.rows(0, rows, ragged=True), _device(packed))


def _device(packed: PackedWeight) -> torch.device:
    return next(iter(packed.buffers.values())).device
