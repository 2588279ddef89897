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

from lowbit.kernels import PackedWeight, choose
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.settled import settled
from lowbit.kernels.timing import LayerSample, sample_rows
from lowbit.layers.linear import Linear
from lowbit.numerics.quantized_tensor import QuantizedTensor


class Samples:
    """One sample for each (kernel, scheme, shape), and how many layers there are of it."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str, tuple[int, ...]], LayerSample] = {}
        self._counts: dict[LayerSample, int] = {}

    def note(
        self, weight: QuantizedTensor | None, packed: PackedWeight, transform: InputTransform | None
    ) -> None:
        """A weight that the model multiplies with, packed, and what is done to its inputs.

        ``weight`` None: it was packed at an earlier start. It is taken apart if somebody times it.
        """
        activation = None if transform is None else transform.scheme
        scheme = str(replace(packed.scheme, activation=activation))
        key = (packed.kernel.name, scheme, packed.shape)
        if key not in self._samples:
            rows = _timed_rows(packed)
            run: Callable[[Tensor], Tensor]
            if weight is None:
                run = _Unpacked(packed, rows, transform)
            else:
                few = _first_rows(weight, packed, rows)
                run = Linear("timing", [few], None, [settled(few, transform)])
            shape = (packed.shape[-2], packed.shape[-1])
            plain = packed.scheme.is_dense and activation is None
            self._samples[key] = LayerSample(packed.kernel.name, scheme, shape, rows, run, plain)
        sample = self._samples[key]
        self._counts[sample] = self._counts.get(sample, 0) + 1

    @property
    def counts(self) -> dict[LayerSample, int]:
        """How many layers of each kind were noted."""
        return self._counts


class _Unpacked:
    """A layer of the first rows of a packed weight, made when it is first called."""

    def __init__(self, packed: PackedWeight, rows: int, transform: InputTransform | None) -> None:
        self._packed = packed
        self._rows = rows
        self._transform = transform
        self._layer: Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._layer is None:
            weight = self._packed.kernel.unpack(self._packed)
            few = _first_rows(weight, self._packed, self._rows)
            self._layer = Linear("timing", [few], None, [settled(few, self._transform)])
        return self._layer(x)


def _timed_rows(packed: PackedWeight) -> int:
    """So many rows as suffice, or all where another kernel would take those."""
    rows, columns = sample_rows(packed.shape), packed.shape[-1]
    kernel = choose(packed.scheme, (rows, columns), _device(packed)).kernel
    return rows if kernel.name == packed.kernel.name else packed.shape[-2]


def _first_rows(weight: QuantizedTensor, packed: PackedWeight, rows: int) -> PackedWeight:
    if rows == packed.shape[-2]:
        return packed
    return packed.kernel.pack(weight.rows(0, rows, ragged=True), _device(packed))


def _device(packed: PackedWeight) -> torch.device:
    return next(iter(packed.buffers.values())).device
