"""How torchao 0.18 quantizes the inputs of a Linear: by its checkpoints and by its online names.

Everything is computed in bfloat16, as torchao's tensors are: the largest |x|, the scale, the quotient.

    int8     scale max|x| / 127.5, at least 2^-23; codes x * (1 / scale) in -128 … 127
    float8   scale max|x| / 448; codes x / scale, saturating

Asymmetric int8 inputs (8da4w) are the exception: torchao computes their scale, (max - min) / 255, in the
model's type, here it is float32, as it is for a float32 model. The zero point is -128 - min / scale, rounded.

MX inputs have a power of two for each block of columns: that of the largest |x|, over the largest of the
format (floor); of the next one where the mantissa of the largest |x| would round up with as many digits as a
code has (even), or is not zero (ceil); or the least with which nothing saturates (rceil). They are computed
in float32.

One scale a token (PerRow), or one for all of a step's tokens (PerTensor): then, and only then, a token's
result depends on its neighbours, as it does in torchao.
"""

from __future__ import annotations

import math

from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.scheme import ActivationScheme

E4M3_LIMIT = 448.0
INT8_LIMIT = 127.5
SMALLEST_INT8_SCALE = 2.0**-23
PER_ROW = (1, 0)
PER_TENSOR = (0, 0)
MX_MODES = ("floor", "even", "ceil", "rceil")
_MANTISSA = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2}


def int8_inputs(block: tuple[int, int] = PER_ROW) -> ActivationScheme:
    """Symmetric int8 inputs."""
    return ActivationScheme(
        number_format("int8"),
        block,
        limit=INT8_LIMIT,
        scale=number_format("bf16"),
        input="bf16",
        floor=SMALLEST_INT8_SCALE,
        reciprocal=True,
    )


def float8_inputs(block: tuple[int, int] = PER_ROW, upper_bound: float = 0.0) -> ActivationScheme:
    """e4m3 inputs; ``upper_bound``: the largest |x| that a scale takes account of, 0 = none."""
    return ActivationScheme(
        number_format("e4m3"),
        block,
        limit=E4M3_LIMIT,
        scale=number_format("bf16"),
        upper_bound=upper_bound,
        input="bf16",
    )


def int8_inputs_with_zeros() -> ActivationScheme:
    """Asymmetric int8 inputs, one scale and zero point a token."""
    return ActivationScheme(number_format("int8"), PER_ROW, symmetric=False)


def mx_inputs(fmt: NumberFormat, block: int, mode: str) -> ActivationScheme:
    """Inputs under powers of two; ``mode``: one of ``MX_MODES``."""
    # Of a power of two: the least mantissa that counts as the next one.
    round_up = {"even": 2.0 - 2.0 ** -(_MANTISSA[fmt.name] + 1), "ceil": 1.0 + 2.0**-23}.get(mode, 0.0)
    largest = max(value for value in fmt.values or () if math.isfinite(value))
    limit = largest if mode == "rceil" else 0.0
    return ActivationScheme(fmt, (1, block), limit=limit, scale=number_format("e8m0"), round_up=round_up)
