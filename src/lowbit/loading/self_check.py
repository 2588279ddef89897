"""The start-up check: every packed weight against the reference on a few rows of its real numbers.

A kernel that was compiled wrongly, or chosen for a layout it misreads, refuses to serve instead of serving
another model. One token goes through each weight; a handful of rows are dequantized for comparison.
"""

from __future__ import annotations

import torch

from lowbit.errors import LowbitError
from lowbit.kernels import PackedWeight
from lowbit.numerics.quantized_tensor import QuantizedTensor

ROWS = 4
# Of |row| |x|, of which a product of n columns is about 1 / sqrt(n). Inputs are exact in bfloat16 and weights
# are not rounded: what is left is the rounding of float32 sums, and of bfloat16 results on other devices, or
# inputs where the kernel scales them first.
TOLERANCE, BFLOAT_TOLERANCE = 1e-4, 2e-3


def check_packed(weight: QuantizedTensor, packed: PackedWeight) -> None:
    """E0705 where the kernel's product of some rows disagrees with the definition."""
    if packed.kernel.name == "reference":
        return
    start, stop = _few_rows(weight)
    device = next(iter(packed.buffers.values())).device
    x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(start)).bfloat16().float()
    few = weight.rows(start, stop, ragged=True).expand()
    dense = few.dequantize()
    if packed.kernel.rounds(packed.scheme):
        dense = dense.bfloat16().float()
    wanted = (x @ dense.T)[0]
    dtype = packed.inputs or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    got = packed.kernel.linear(x.to(device, dtype), packed)[0, start:stop].float().cpu()
    scale = (dense.norm(dim=1) + _cancelled(few)) * x.norm()
    # "not <=": NaN must fail too, but where the file's own numbers make it.
    exact = dtype is torch.float32 and not weight.scheme.scales_columns
    tolerance = TOLERANCE if exact else BFLOAT_TOLERANCE
    wrong = ~((got - wanted).abs() / scale <= tolerance) & (got.isfinite() | wanted.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise LowbitError(
            "E0705",
            f"{weight.origin}: in row {start + row} kernel {packed.kernel.name!r} gives "
            f"{float(got[row]):.6g} and the reference {float(wanted[row]):.6g}; nothing is served with it. "
            "LOWBIT_ISA=scalar runs without it; please report",
        )


def _cancelled(few: QuantizedTensor) -> float:
    """What a row of zeros may be off by, where they are zero by cancellation (code - zero)."""
    largest = 1e-30
    for levels in (few.scales, few.offsets):
        product = 1.0
        for level in levels:
            product *= float(level.float().abs().max())
        largest = max(largest, product if levels else 0.0)
    return 1e-3 * largest * 2 ** int(few.scheme.weight.bits) * few.shape[1] ** 0.5


def _few_rows(weight: QuantizedTensor) -> tuple[int, int]:
    """A few rows in the last third of the matrix, from a block border of every level on."""
    out = weight.shape[0]
    if weight.scheme.flattened:
        return (0, min(ROWS, out))
    height = max(weight.scheme.heights) or 1
    first = out * 2 // 3 // height * height
    return first, min(first + ROWS, out)
