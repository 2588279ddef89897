"""Samples: a few rows of every kind of layer a model has, for ``kernels.timing``.

They are cut from the weights as these are loaded and packed, so that what is timed has the model's own
numbers in its own layout, also where the whole layer would take too long. A kind costs a few MiB until the
model is timed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

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

    def note(self, weight: QuantizedTensor, packed: PackedWeight, transform: InputTransform | None) -> None:
        """A weight that the model multiplies with, packed, and what is done to its inputs."""
        activation = None if transform is None else transform.scheme
        scheme = str(replace(weight.scheme, activation=activation))
        key = (packed.kernel.name, scheme, packed.shape)
        if key not in self._samples:
            few = _first_rows(weight, packed)
            layer = Linear("timing", [few], None, [settled(few, transform)])
            shape = (packed.shape[-2], packed.shape[-1])
            plain = weight.scheme.is_dense and activation is None
            self._samples[key] = LayerSample(packed.kernel.name, scheme, shape, few.shape[-2], layer, plain)
        sample = self._samples[key]
        self._counts[sample] = self._counts.get(sample, 0) + 1

    @property
    def counts(self) -> dict[LayerSample, int]:
        """How many layers of each kind were noted."""
        return self._counts


def _first_rows(weight: QuantizedTensor, packed: PackedWeight) -> PackedWeight:
    rows = sample_rows(packed.shape)
    if rows == packed.shape[-2]:
        return packed
    device: torch.device = next(iter(packed.buffers.values())).device
    few = weight.rows(0, rows, ragged=True)
    kernel = choose(few.scheme, few.shape, device).kernel
    return kernel.pack(few, device) if kernel.name == packed.kernel.name else packed
