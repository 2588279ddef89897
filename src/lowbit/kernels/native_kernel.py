"""NativeKernel: what linear kernels of the native library on a CPU say alike; see ``LinearKernel``.

A kernel of this base has a name and the version of its layout, and says what it refuses, how many bytes it
takes, and how it packs, restores and unpacks. One whose weight is no ``NativeWeight`` has its own ``linear``
and ``rows`` as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.scheme import Scheme


class NativeKernel:
    """See the module docstring."""

    computes = "as stored"
    steady = True
    runs = "quantized"

    def serves(self, device: torch.device) -> bool:
        """CPUs."""
        return device.type == "cpu"

    def rounds(self, scheme: Scheme) -> bool:
        """Never, or by no more than a part of what is lost of x: codes are exact, scales are float32's."""
        return False

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Never."""
        return False

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None: what every native kernel of quantized weights says."""
        return packed_linear.unfit(scheme, shape, device)

    def check(self, scheme: Scheme, shape: tuple[int, ...], origin: str) -> None:
        """ValueError where it refuses such a weight: of packed ones that were kept."""
        if reason := self.refuses(scheme, shape, torch.device("cpu")):
            raise ValueError(f"{origin}: {reason}")

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        return packed_linear.linear(x, packed, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        return packed_linear.rows(packed, ids)
