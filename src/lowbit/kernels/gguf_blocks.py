"""GGUF's block formats as native kernels pack them: codes under one or two levels of scales."""

from __future__ import annotations

from functools import cache

import torch

from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.scheme import Scheme

# Those whose inner scales are small whole numbers and whose outer ones are f16.
TWO_LEVEL = {f"gguf_{name}" for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")}
_SMALL_FLOATS = {"gguf_mxfp4": "bf16", "gguf_nvfp4": "e4m3"}  # what holds their scales exactly
_ONE_LEVEL = {
    f"gguf_{name}" for name in ("q1_0", "tq1_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "tq2_0")
}
# Those whose inner scales have 4 bits: what the first two are worth.
NIBBLES = {"gguf_q2_k": (0.0, 1.0), "gguf_iq3_xxs": (0.25, 0.75), "gguf_iq3_s": (1.0, 3.0)}
NIBBLES |= {f"gguf_iq2_{name}": (0.125, 0.375) for name in ("xxs", "xs", "s")}
NIBBLES |= {f"gguf_iq1_{name}": (0.125, 0.375) for name in ("s", "m")}
# Those whose codes are indices of vectors: how they are stored, and the grid's name.
GRID_TYPES = {
    "gguf_iq1_s": ("grid1_2048", "IQ1_S"),
    "gguf_iq1_m": ("grid1_2048", "IQ1_S"),
    "gguf_iq2_xxs": ("grid2_256", "IQ2_XXS"),
    "gguf_iq2_xs": ("grid2_512", "IQ2_XS"),
    "gguf_iq2_s": ("grid2_1024", "IQ2_S"),
    "gguf_iq3_xxs": ("grid3_256", "IQ3_XXS"),
    "gguf_iq3_s": ("grid3_512", "IQ3_S"),
}


@cache
def expanded(scheme: Scheme) -> Scheme | None:
    """The scheme a block format takes apart to, or None where its scales have no native form."""
    name, layout = scheme.weight.name, scheme.weight.block
    if layout is None:
        return scheme
    if name not in TWO_LEVEL | _ONE_LEVEL | NIBBLES.keys() and name not in _SMALL_FLOATS:
        return None
    parts = layout.expand(torch.zeros(1, layout.bytes, dtype=torch.uint8))
    inner = _SMALL_FLOATS.get(name, "int8" if name in TWO_LEVEL else "f16")
    scales = [number_format(scale) for scale in (inner, "f16")[: len(parts.columns)]]
    codes = number_format(parts.number_format)
    if name in NIBBLES:
        first, second = NIBBLES[name]
        values = tuple(first + (second - first) * i for i in range(16))
        scales[0] = NumberFormat(f"{name} scales", 4, values)
    if name in GRID_TYPES:
        codes = NumberFormat(name, scheme.weight.bits, codes.values)
    return Scheme(
        codes,
        tuple((1, columns) for columns in parts.columns),
        tuple(scales),
        offset=bool(parts.offsets),
        activation=scheme.activation,
    )
