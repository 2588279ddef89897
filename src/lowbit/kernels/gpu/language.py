"""What every Triton kernel shares: functions to call inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu import runtime

INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def one(out):  # type: ignore[no-untyped-def]
    """1 into int32 ``out``: ``runtime.check``."""
    tl.store(out, 1)


@triton.jit
def dot(a, b, total):  # type: ignore[no-untyped-def]
    """total + a @ b with float32 sums; a and b have one type, float32 is multiplied as such (no TF32).

    int8 has int32 sums. Two kinds of 8-bit floats may meet. Triton's interpreter multiplies the bit patterns
    of bfloat16 and 8-bit floats: there they become float32, which gives the same products.
    """
    if a.dtype == tl.int8:
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    elif INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _bfloat16_bits(x):  # type: ignore[no-untyped-def]
    """What float32 x is as bfloat16, to nearest even, in the upper half of int32."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, 0x7FC00000)


@triton.jit
def bfloat16_value(x):  # type: ignore[no-untyped-def]
    """float32 x rounded to bfloat16's nearest, to even; Triton's interpreter would cut it short."""
    if INTERPRETED:
        return _bfloat16_bits(x).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def cast(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x as another float type, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        return (_bfloat16_bits(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
