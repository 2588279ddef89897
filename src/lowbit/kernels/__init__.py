"""Kernels: what runs a packed weight. ``linear_kernels`` is in order of preference; reasons are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from lowbit.kernels.linear_kernel import ANY_USE, LinearKernel, PackedWeight, ParticularKernel, Use
from lowbit.numerics.scheme import Scheme

__all__ = [
    "ANY_USE",
    "Choice",
    "LinearKernel",
    "Loser",
    "PackedWeight",
    "ParticularKernel",
    "Use",
    "choose",
    "linear_kernels",
    "refusal",
]


@cache
def linear_kernels() -> tuple[LinearKernel, ...]:
    """All linear kernels, best first. The reference refuses nothing; what stands behind it is taken by name,
    or by timing (``kernel_choice``). ``GpuHumming`` stands there until a measurement puts it elsewhere."""
    from lowbit.kernels.cpu_blocks import CpuBlocks
    from lowbit.kernels.cpu_columns import CpuColumns
    from lowbit.kernels.cpu_dense import CpuDense
    from lowbit.kernels.cpu_dequantized import CpuDequantized, CpuExpanded
    from lowbit.kernels.cpu_lattice import CpuLattice
    from lowbit.kernels.cpu_row_vectors import CpuRowVectors
    from lowbit.kernels.cpu_trellis import CpuTrellis
    from lowbit.kernels.cpu_vectors import CpuVectors
    from lowbit.kernels.gpu.columns import GpuColumns
    from lowbit.kernels.gpu.halves import GpuHalves
    from lowbit.kernels.gpu.humming import GpuHumming
    from lowbit.kernels.gpu.lattice import GpuLattice
    from lowbit.kernels.gpu.linear import GpuBlocks, GpuDense
    from lowbit.kernels.gpu.row_vectors import GpuRowVectors
    from lowbit.kernels.gpu.trellis import GpuTrellis
    from lowbit.kernels.gpu.vectors import GpuVectors
    from lowbit.kernels.reference import Reference

    codes = CpuBlocks(), CpuColumns(), CpuVectors(), CpuRowVectors(), CpuTrellis(), CpuLattice()
    floats = CpuDense(), CpuExpanded(), Reference(), CpuDequantized()
    gpu = GpuBlocks(), GpuColumns(), GpuHalves(), GpuTrellis(), GpuVectors(), GpuRowVectors()
    return (*gpu, GpuLattice(), GpuDense(), *codes, *floats, GpuHumming())


@dataclass(frozen=True)
class Loser:
    """A kernel that would run a weight and was not chosen, and why not."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a weight, why the ones before it refuse it, and what else would run it.

    ``by``: what decided, where it was not the order of preference. ``contested``: whether timing had a say.
    """

    kernel: LinearKernel
    refusals: tuple[tuple[str, str], ...]  # (kernel name, reason)
    losers: tuple[Loser, ...] = ()
    by: str = ""
    contested: bool = False


def refusal(
    kernel: LinearKernel, scheme: Scheme, shape: tuple[int, ...], device: torch.device, use: Use = ANY_USE
) -> str | None:
    """Why a kernel cannot serve a weight for such a use, or None."""
    reason = kernel.refuses(scheme, shape, device)
    if reason is None and isinstance(kernel, ParticularKernel):
        return kernel.unfit(scheme, shape, device, use)
    return reason


def choose(scheme: Scheme, shape: tuple[int, ...], device: torch.device, use: Use = ANY_USE) -> Choice:
    """The first kernel that does not refuse."""
    refusals: list[tuple[str, str]] = []
    for kernel in linear_kernels():
        if not kernel.serves(device):
            continue
        reason = refusal(kernel, scheme, shape, device, use)
        if reason is None:
            return Choice(kernel, tuple(refusals))
        refusals.append((kernel.name, reason))
    raise AssertionError("the reference kernel refuses nothing")
