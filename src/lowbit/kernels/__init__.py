"""Kernels: what runs a packed weight. ``KERNELS`` is in order of preference; reasons are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from lowbit.errors import LowbitError
from lowbit.kernels.linear_kernel import LinearKernel, PackedWeight
from lowbit.numerics.scheme import Scheme

__all__ = ["Choice", "LinearKernel", "PackedWeight", "choose", "linear_kernels"]


@cache
def linear_kernels() -> tuple[LinearKernel, ...]:
    """All linear kernels, best first; the last one refuses nothing."""
    from lowbit.kernels.cpu_blocks import CpuBlocks
    from lowbit.kernels.cpu_dense import CpuDense
    from lowbit.kernels.reference import Reference

    return (CpuBlocks(), CpuDense(), Reference())


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a weight and why the ones before it were not."""

    kernel: LinearKernel
    refusals: tuple[tuple[str, str], ...]  # (kernel name, reason)


def choose(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> Choice:
    """The first kernel that does not refuse."""
    refusals: list[tuple[str, str]] = []
    for kernel in linear_kernels():
        reason = kernel.refuses(scheme, shape, device)
        if reason is None:
            return Choice(kernel, tuple(refusals))
        refusals.append((kernel.name, reason))
    listed = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise LowbitError("E0410", f"no kernel runs scheme {scheme} of shape {shape}: {listed}")
