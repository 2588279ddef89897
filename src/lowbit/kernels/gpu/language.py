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
