"""cpu_dense: f32, f16 and bf16 weights on AVX2 and AVX-512, in the same tiles as the quantized ones.

bf16 weights meet a bf16-rounded input; f32 and f16 weights meet the input as it is, in float32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import (
    ADDEND_NONE,
    COLUMNS,
    DENSE_CODES,
    SCALES_NONE,
    Description,
    NativeWeight,
    Parts,
)
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


class CpuDense:
    """See the module docstring."""

    name = "cpu_dense"
    computes = "as stored"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := packed_linear.unusable(device):
            return reason
        if not scheme.is_dense:
            return "weights are quantized"
        return "stacked experts" if len(shape) != 2 else None

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Never: nothing here multiplies whole numbers."""
        return False

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The matrix in tiles, columns padded with zeros to whole ones."""
        out, columns = weight.shape
        padded = -(-columns // COLUMNS) * COLUMNS
        codes = DENSE_CODES[weight.scheme.weight.name]
        description = Description(None, None, out, padded, codes, COLUMNS, SCALES_NONE, ADDEND_NONE)
        table = torch.zeros(64, dtype=torch.bfloat16)
        description.table = table.data_ptr()
        buffers = {"data": packed_linear.pack(description, Parts(weight.codes.contiguous())), "table": table}
        return NativeWeight(
            self,
            weight.scheme,
            weight.shape,
            buffers,
            weight.origin,
            description,
            ctypes.addressof(description),
            columns,
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The matrix again."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        matrix = packed_linear.unpack(packed).codes
        return QuantizedTensor(packed.scheme, packed.shape, matrix, origin=packed.origin)

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        return packed_linear.linear(x, packed, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        return packed_linear.rows(packed, ids)
