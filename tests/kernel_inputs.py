"""What a linear kernel makes of x before it multiplies: whole numbers, bfloat16, or x as it is.

That depends on the instruction set in use, which is asked (``packed_linear.takes``).
"""

from __future__ import annotations

import torch

from lowbit.kernels import PackedWeight, native
from lowbit.kernels.packed_linear import INPUT_WORDS, NativeWeight, takes

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
        turned = x if order is None else x[:, order]
        seen = in_words(turned, 16383 if wide else 32767)
        return seen if order is None else torch.empty_like(seen).index_copy_(1, order, seen)
    exact = packed.scheme.weight.name in ("f16", "f32") or packed.kernel.computes == "f32 copy"
    return x.double() if exact else x.bfloat16().double()
