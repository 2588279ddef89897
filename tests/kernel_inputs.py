"""What linear kernels multiply: of x whole numbers, bfloat16 or x itself; of weights what they make of them.

That depends on the instruction set in use, which is asked (``packed_linear.takes``).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.kernels import PackedWeight, native
from lowbit.kernels.packed_linear import INPUT_WORDS, NativeWeight, takes
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor

# Whether products of codes that bfloat16 holds round x to it, as those of bfloat16 matrices do everywhere.
ROUNDS_INPUTS = native.base_isa() in ("amx", "avx512", "neon_bf16")


def in_words(x: torch.Tensor, largest: int = 16383) -> torch.Tensor:
    """float64: x as whole numbers up to ``largest`` with a scale for each 32 columns, InputKind::words.

    Those of 16 bits have powers of two for scales.
    """
    columns = x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -columns % 32)).unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / largest
    if largest == 32767:
        scale = scale.log2().ceil().exp2()
    inverse = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1 / scale)
    return ((groups * inverse).round().double() * scale.double()).flatten(1)[:, :columns]


def seen_by(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """float64: x as the kernel multiplies it, whole numbers of 15 or 16 bits, bfloat16 or what it is."""
    if not isinstance(packed, NativeWeight):
        return x.double()
    order = packed.buffers.get("column_order")
    if takes(packed.description, INPUT_WORDS):
        fmt = packed.scheme.weight
        wide = fmt.name in ("nf4", "fp4_bnb") or fmt.vectors is not None
        wide = wide or (fmt.name == "e3m2" and native.base_isa() == "avx512_vnni")
        turned = x if order is None else x[:, order]
        seen = in_words(turned, 16383 if wide else 32767)
        return seen if order is None else torch.empty_like(seen).index_copy_(1, order, seen)
    exact = packed.scheme.weight.name in ("f16", "f32") or packed.kernel.computes == "f32 copy"
    return x.double() if exact else x.bfloat16().double()


def unrounded(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64: weights beside outliers as no float16 arithmetic has rounded them, and the outliers."""
    assert weight.outliers is not None
    bare = replace(weight, scheme=replace(weight.scheme, outliers=None), outliers=None, column_order=None)
    zeros, scales = bare._spread(bare.zeros, 0).double(), bare._spread(bare.scales[0], 0).double()
    codes, outliers = (bare.codes.double() - zeros) * scales, torch.zeros(weight.shape).double()
    values = weight.outliers.values(number_format("f16"))
    outliers[weight.outliers.rows, weight.outliers.columns] = values.double()
    order = weight.column_order
    if order is None:
        return codes, outliers
    return torch.empty_like(codes).index_copy_(1, order, codes), outliers.index_copy(1, order, outliers)
