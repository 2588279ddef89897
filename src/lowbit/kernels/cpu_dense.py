"""cpu_dense: f32, f16 and bf16 weights on AVX2, AVX-512 and NEON, in the same tiles as the quantized ones.

bf16 weights meet a bf16-rounded input; f32 and f16 weights meet the input as it is, in float32, at half the
rate. A float16 matrix made from bfloat16 numbers, as most published ones were, is packed as the bf16 it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.kernels import packed_linear, unpacking
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import COLUMNS, DENSE_CODES, Description, NativeWeight, Parts
from lowbit.kernels.reference import rows_at_once
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense


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
        if weight.scheme == dense("f16") and _holds_bfloats(weight.codes):
            weight = replace(weight, scheme=dense("bf16"), codes=weight.codes.to(torch.bfloat16))
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
        """The matrix again, in the type it was packed as."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        matrix = unpacking.unpack(packed).codes
        return QuantizedTensor(packed.scheme, packed.shape, matrix, origin=packed.origin)


def describe(scheme: Scheme, shape: tuple[int, ...]) -> Description:
    """The native description of a dense matrix, its columns padded to whole tiles."""
    return Description.plain(shape, DENSE_CODES[scheme.weight.name], group=COLUMNS)


def _holds_bfloats(matrix: Tensor) -> bool:
    """Whether bfloat16 has every number of a float16 matrix; where not, the first slice usually shows it."""
    step = rows_at_once(dense("f16"), (matrix.shape[0], matrix.shape[1]))
    parts = (matrix[first : first + step] for first in range(0, len(matrix), step))
    return all(torch.equal(part.to(torch.bfloat16).to(torch.float16), part) for part in parts)
