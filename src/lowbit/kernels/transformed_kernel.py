"""What kernels share whose tiles stand between two transforms: before them of x, behind them of y."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import NativeWeight
from lowbit.kernels.rotation import Rotator


@dataclass(frozen=True)
class TransformedWeight(PackedWeight):
    """A PackedWeight with the tiles as native code multiplies them, and the transforms on both sides."""

    tiles: NativeWeight = field(kw_only=True, repr=False)
    before: Rotator = field(kw_only=True, repr=False)
    after: Rotator = field(kw_only=True, repr=False)


class TransformedKernel(NativeKernel):
    """Its weights are ``TransformedWeight``. What is rounded is a part of what is lost of x."""

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        assert isinstance(packed, TransformedWeight), "packed by this kernel"
        packed_linear.check_columns(x, packed)
        turned = packed.before.rotated(x, torch.float32)
        out = packed_linear.linear(turned, packed.tiles, out)
        packed.after.in_place(out)
        return out
