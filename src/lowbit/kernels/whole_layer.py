"""A layer as one call: its input's rule, the product, scales, bias and gate, where one weight's kernel has it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.gpu import runtime
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_layer import NativeLayer


class WholeLayer(Protocol):
    """See ``native_layer.NativeLayer`` and ``gpu.layer.GpuLayer``."""

    def takes(self, x: Tensor, out: Tensor | None = None) -> bool:
        """Whether x and the result lie as it reads and writes them."""

    @property
    def halves(self) -> bool:
        """Whether its rows can be a gate's and as many others'."""

    def __call__(self, x: Tensor, out: Tensor | None = None, activation: str | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out); with an activation activation(gate) * up, half as wide."""


def whole_layer(
    weight: PackedWeight, transform: InputTransform | None, bias: Tensor | None
) -> WholeLayer | None:
    """The layer in one call; None where its steps run one by one."""
    device = next(iter(weight.buffers.values())).device
    if runtime.runs_on(device) and weight.kernel.name == "gpu_blocks":
        from lowbit.kernels.gpu.layer import GpuLayer

        return GpuLayer.of(weight, transform, bias)
    return NativeLayer.of(weight, transform, bias)
