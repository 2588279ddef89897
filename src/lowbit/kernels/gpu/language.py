"""What every Triton kernel shares: functions to call inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu import runtime

INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def dot(a, b, total):  # type: ignore[no-untyped-def]
    """total + a @ b with float32 sums; a and b have one type, float32 is multiplied as such (no TF32).

    Triton's interpreter multiplies the bit patterns of bfloat16 and 8-bit floats: there they become float32,
    which gives the same products.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x as another float type, to nearest even; Triton's interpreter would cut bfloat16 short."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
