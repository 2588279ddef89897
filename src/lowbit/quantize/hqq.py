"""HQQ: half-quadratic quantization (Badri and Shaji, 2023), as hqq 0.2.8 computes it on a CPU, axis 1.

A group of columns starts with the range of its weights, steps = (2^bits - 1) / (max - min), and a zero point
in code units, zero = -min * steps (rounded with 4 bits). Then zero alone is moved, at most 20 times, to
lessen sum |error|^0.7, which forgives outliers:

    q = round(w * steps + zero)                       in 0 … 2^bits - 1
    e = shrink(w - (q - zero) / steps)                sign(e) * max(|e| - |e|^-0.3 / beta, 0)
    zero = mean(q - (w - e) * steps)                  beta = 10

until the mean |error| over the whole matrix no longer falls. (The paper lets beta grow by 1 % each time;
this version of the tool reads that number and leaves beta alone.) Range: below 0.0001 a group is not
stretched (steps = 1), and steps are at most 20,000. Everything in float32, as the tool on a CPU; on a GPU it
uses float16 and finds other codes. 7 bits, which the tool has no packing for, follow the same rule.

The weight is (q - zero) / steps with a zero point that is no whole number; scale = 1 / steps and zero are
kept as the tool keeps them, in float16, which rounds a weight by at most a last bit of float16 at the size of
the group's range. Groups that lie so far from zero that their zero point would be no float16 (the tool makes
infinity of it) are stretched less: 60,000 steps from zero to the farthest weight are finer than float16.
The mean error is taken slice by slice, so that a weight of any size takes little memory; of weights above 4
million the tool may stop one step earlier or later where two means differ in the seventh digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.method import Coded, Method, Module, Quantized, check_finite, number, sliced, slices
from lowbit.quantize.rounding import blocked, stored_scale
from lowbit.quantize.specification import MethodSpec

_ITERATIONS = 20
_BETA = 10.0
_NORM = 0.7
_SMALLEST_RANGE = 1e-4
_MOST_STEPS = 2e4
_FARTHEST = 6e4  # of a zero point from code 0: the search moves it by some codes more


@dataclass(frozen=True)
class HalfQuadratic:
    """See the module docstring."""

    spec: MethodSpec

    @property
    def _bits(self) -> int:
        return number(self.spec.options, "bits")

    @property
    def _size(self) -> int:
        return number(self.spec.options, "group_size")

    def refuses(self, module: Module) -> str | None:
        """Where groups do not fit."""
        columns = module.shape[1]
        return f"needs in % {self._size} == 0, got {columns}" if columns % self._size else None

    def scheme_of(self, module: Module) -> Scheme:
        """float16 scales and zero points."""
        fmt = number_format(f"uint{self._bits}")
        return Scheme(fmt, ((1, self._size),), (number_format("f16"),), zero="float")

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """The search, then codes with the zero points it ended with."""
        search = _Search.start(weight, self._bits, self._size, origin)
        search.run(weight)
        scale = stored_scale(1.0 / search.steps, torch.float16)
        zero = search.zero.clamp(-65504, 65504).half()
        rest = iter(search.parts(weight))

        def encode(rows: Tensor) -> Coded:
            _, steps, exact = next(rest)
            codes = _codes(blocked(rows, self._size), steps, exact, self._bits)
            return Coded(codes.to(torch.uint8).flatten(1))

        quantized = sliced(self.scheme_of(module), weight, origin, encode)
        return Quantized(replace(quantized, scales=(scale,), zeros=zero))


@dataclass
class _Search:
    """``steps`` and ``zero``: float32 (rows, groups)."""

    bits: int
    size: int
    steps: Tensor
    zero: Tensor

    @classmethod
    def start(cls, weight: Tensor, bits: int, size: int, origin: str) -> _Search:
        """From each group's range."""
        found, row = [], 0
        for rows in slices(weight):
            check_finite(rows, origin, row)
            row += len(rows)
            groups = blocked(rows, size)
            low, high = groups.amin(-1), groups.amax(-1)
            span, far = high - low, torch.maximum(low.abs(), high.abs())
            steps = torch.where(span <= _SMALLEST_RANGE, 1.0, (2**bits - 1) / span).clamp(max=_MOST_STEPS)
            steps = torch.minimum(steps, _FARTHEST / far)
            found.append((steps, -low * steps))
        steps, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls(bits, size, steps, zero.round() if bits == 4 else zero)

    def parts(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A few rows in groups, their steps and zero points; these are views."""
        start = 0
        for rows in slices(weight):
            stop = start + len(rows)
            yield blocked(rows, self.size), self.steps[start:stop], self.zero[start:stop]
            start = stop

    def run(self, weight: Tensor) -> None:
        """Move zero until the error no longer falls; the last move stays, as in the tool."""
        best = float("inf")
        for _ in range(_ITERATIONS):
            error = 0.0
            for groups, steps, zero in self.parts(weight):
                error += self._move(groups, steps, zero) * (groups.numel() / weight.numel())
            if error >= best:
                return
            best = error

    def _move(self, groups: Tensor, steps: Tensor, zero: Tensor) -> float:
        """One step, ``zero`` changed in place; the mean |error| before it."""
        wide, codes = steps.unsqueeze(-1), _codes(groups, steps, zero, self.bits)
        work = (codes - zero.unsqueeze(-1)).div_(wide)
        difference = torch.sub(groups, work, out=work)
        size = difference.abs()
        kept = size.pow(_NORM - 1).mul_(1.0 / _BETA)
        kept = torch.sub(size, kept, out=kept).clamp_(min=0).mul_(difference.sign_())
        rest = torch.sub(groups, kept, out=kept).mul_(wide)
        zero.copy_(torch.sub(codes, rest, out=rest).mean(-1))
        return float(size.mean())


def _codes(groups: Tensor, steps: Tensor, zero: Tensor, bits: int) -> Tensor:
    """float32: the nearest codes of weights in groups."""
    return (groups * steps.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(0, 2**bits - 1)


def build(spec: MethodSpec) -> Method:
    """The method of a specification."""
    return HalfQuadratic(spec)
