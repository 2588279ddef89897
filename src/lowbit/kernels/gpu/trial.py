"""Trials of optional packages: before a kernel of theirs is used it computes something small that is known.

A package may be built for another CUDA, lack a compiler, or be wrong on a GPU its authors never had: whatever
happens in the trial, an exception or other numbers, is a reason not to use the kernel, said once in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lowbit.errors import printable
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_log = logging.getLogger("lowbit")
_faults: dict[Hashable, str] = {}


def fault(kernel: str, kind: Hashable, device: torch.device, trial: Callable[[], str]) -> str | None:
    """Why ``kernel`` is not used for a kind of work on a device, or None; the trial runs once for each.

    ``trial``: what differs, "" where nothing does.
    """
    key = (kernel, kind, device)
    if key not in _faults:
        try:
            found = trial()
        except Exception as error:  # a package's, which nothing depends on
            said = str(error).partition("\n")[0]
            found = f"{type(error).__name__}: {said}" if said else type(error).__name__
        _faults[key] = f"its self-test with {kind} failed: {printable(found, 200)}" if found else ""
        if found:
            _log.warning("lowbit: %s is not used on %s: %s", kernel, device, _faults[key])
    return _faults[key] or None


def differs(found: Tensor, wanted: Tensor, size: Tensor, tolerance: float) -> str:
    """What to say where |found - wanted| is over ``tolerance`` times ``size``, or no number; else ""."""
    off = ((found - wanted).abs() / size).nan_to_num(torch.inf, torch.inf, torch.inf).max().item()
    return f"results are off by {off:.2g} of their size" if off > tolerance else ""


def random_weight(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    """A weight on the CPU whose groups all differ."""
    draw = torch.Generator().manual_seed(1)
    finite = scheme.weight.table().isfinite().nonzero().flatten()
    codes = finite[torch.randint(len(finite), shape, generator=draw)].to(torch.uint8)

    def blocks(level: int) -> tuple[int, int]:
        rows, columns = scheme.blocks[level]
        return -(-shape[0] // (rows or shape[0])), -(-shape[1] // (columns or shape[1]))

    scales = []
    for level, stored in enumerate(scheme.scales):
        power = torch.randint(-3, 2, blocks(level), generator=draw).float().exp2()
        spread = 1.0 if stored.name == "e8m0" else torch.rand(blocks(level), generator=draw) + 0.5
        scales.append((power * spread).to(stored.dtype))
    zeros = None
    if scheme.zero == "integer":
        zeros = torch.randint(1 << int(scheme.weight.bits), blocks(0), generator=draw).to(torch.uint8)
    return QuantizedTensor(scheme, shape, codes, tuple(scales), zeros, origin="self-test")
