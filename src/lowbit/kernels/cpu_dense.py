"""cpu_dense: f32, f16 and bf16 weights on AVX2, AVX-512 and NEON, in the same tiles as the quantized ones.

bf16 weights meet a bf16-rounded input; f32 and f16 weights meet the input as it is, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import packed_linear, unpacking
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import COLUMNS, DENSE_CODES, Description, NativeWeight, Parts
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


class CpuDense(NativeKernel):
    """See the module docstring."""

    name = "cpu_dense"
    layout = 1
    runs = "unquantized"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := packed_linear.unusable(device):
            return reason
        if not scheme.is_dense:
            return "weights are quantized"
        return "stacked experts" if len(shape) != 2 else None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the tiles."""
        return describe(scheme, shape).nbytes

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The matrix in tiles, columns padded with zeros to whole ones."""
        description = describe(weight.scheme, weight.shape)
        data = packed_linear.pack(description, Parts(weight.codes.contiguous()))
        buffers = {"data": data, "table": torch.zeros(64, dtype=torch.bfloat16)}
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        return packed_linear.around(self, describe(scheme, shape), scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The matrix again."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        matrix = unpacking.unpack(packed).codes
        return QuantizedTensor(packed.scheme, packed.shape, matrix, origin=packed.origin)


def describe(scheme: Scheme, shape: tuple[int, ...]) -> Description:
    """The native description of a dense matrix, its columns padded to whole tiles."""
    return Description.plain(shape, DENSE_CODES[scheme.weight.name], group=COLUMNS)
