"""cpu_dequantized: a quantized weight as a bfloat16 matrix, made once, when packed, on cpu_dense's tiles.

It takes what every scheme takes as bf16, two bytes a weight, and what the stored numbers lose by rounding to
bfloat16 is lost (``rounds``). Never the first choice: it is there for weights no other kernel runs fast, and
for much prefill of tables that multiply in float32, by ``--linear-kernel`` or, where nothing is rounded, by
timing (``kernels.kernel_choice``).

cpu_expanded: the same in float32, which is what every scheme means, and so nothing is lost. It takes what has
a scale and a zero point for each weight (HQQ's strided groups of axis 0) and is no smaller as it is stored.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import cpu_dense, packed_linear, unpacking
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import NativeWeight, Parts
from lowbit.kernels.reference import rows_at_once
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_BFLOAT16_BITS = 8  # of a significand, the leading one included
# Significant bits of the numbers a scale may be; powers of two need none of their own in a product.
_SCALE_BITS = {"e8m0": 0, "e4m3": 4, "bf16": _BFLOAT16_BITS, "f16": 11, "f32": 24}


class CpuDequantized(NativeKernel):
    """See the module docstring."""

    name = "cpu_dequantized"
    computes = "bf16 copy"
    layout = 1
    floats = "bf16"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := packed_linear.unusable(device):
            return reason
        if scheme.is_dense:
            return "weights are not quantized"
        return "stacked experts" if len(shape) != 2 else None

    def rounds(self, scheme: Scheme) -> bool:
        """Whether a product of code and scales needs more bits than bfloat16's significand has."""
        if scheme.weight.values is None or scheme.offset or scheme.zero == "float":
            return True
        bits = int(scheme.weight.bits) if scheme.zero == "integer" else _code_bits(scheme.weight)
        return bits + sum(_SCALE_BITS.get(scale.name, 24) for scale in scheme.scales) > _BFLOAT16_BITS

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the tiles."""
        return cpu_dense.describe(dense(self.floats), shape).nbytes

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The dequantized matrix in tiles; some rows are float32 at a time."""
        rows, columns = weight.shape
        matrix = torch.empty(rows, columns, dtype=number_format(self.floats).dtype)
        step = rows_at_once(weight.scheme, weight.shape)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            matrix[start:stop] = weight.rows(start, stop).dequantize()
        data = packed_linear.pack(cpu_dense.describe(dense(self.floats), weight.shape), Parts(matrix))
        buffers = {"data": data, "table": torch.zeros(64, dtype=torch.bfloat16)}
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        described = cpu_dense.describe(dense(self.floats), shape)
        return packed_linear.around(self, described, scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The matrix of floats: what is multiplied, the codes are gone."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        matrix = unpacking.unpack(packed).codes
        return QuantizedTensor(dense(self.floats), packed.shape, matrix, origin=packed.origin)


class CpuExpanded(CpuDequantized):
    """See the module docstring."""

    name = "cpu_expanded"
    computes = "f32 copy"
    floats = "f32"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        bits = scheme.bits_per_weight(shape)
        return None if bits >= 32 else f"{bits:.3g} bits a weight would become 32"

    def rounds(self, scheme: Scheme) -> bool:
        """Never: float32 is what the scheme's numbers are."""
        return False


@cache
def _code_bits(fmt: NumberFormat) -> int:
    """Significant bits that the format's values need; 0 where all are powers of two."""
    values = fmt.table().double()
    fraction, _ = torch.frexp(values[values.isfinite()])  # 0.5 to 1
    bits = next((bits for bits in range(1, 24) if bool((fraction * 2**bits % 1 == 0).all())), 24)
    return bits if bits > 1 else 0
