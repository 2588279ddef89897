"""GPTQ (Frantar et al., 2022): columns are rounded one after another, the rest made up for what was lost.

With H = X Xᵀ over the calibration inputs, rounding column i of W by an error e costs least when every later
column j changes by -e (H⁻¹)ij / (H⁻¹)ii, where H⁻¹ is of the columns not yet rounded. All those inverses are
in one triangular factor U, H⁻¹ = Uᵀ U: column i's is row i of U (the paper's section 3.3). Work goes on in
blocks of columns, the columns behind a block being changed once for all of it.

U comes from one Cholesky factorization: with J the reversal of the order, J H J = L Lᵀ gives U = (J L J)⁻¹.

Choices that matter
- A group's scale is fitted when its first column is reached, to weights already changed. With
  ``static_groups`` all scales are fitted before anything changes.
- ``act_order`` takes columns of the largest diagonal first. Without static groups a group then holds columns
  from anywhere, and the result has a ``column_order`` (g_idx in a file); with them only the order of work
  changes, which costs nothing at run time.
- An input that is always zero says nothing about its column: it is rounded to nearest, not set to zero.
- The diagonal is raised by ``damp`` times its mean, so that a few inputs a column are not taken at their
  word; ten times as much for as long as the factorization fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.quantize.integer_grid import (
    IntegerGrid,
    assemble,
    check_finite,
    columns_of_group,
    in_groups,
)

_DAMPING_TRIES = 7


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    damp: float = 0.05,
    block: int = 128,
    origin: str = "",
) -> QuantizedTensor:
    """Quantize float32 ``weight`` (out, in) under ``hessian`` (in, in), any positive multiple of X Xᵀ.

    ``group_size``: -1 the whole row, None the usual choice (``columns_of_group``). Nothing is changed in
    place.
    """
    columns = weight.shape[1]
    assert hessian.shape == (columns, columns), "the Hessian is of the weight's inputs"
    check_finite(weight, origin)
    grid, group = IntegerGrid(bits, symmetric), columns_of_group(group_size, columns)
    order = torch.arange(columns)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damp, origin)
    static = grid.fit(in_groups(weight, group)) if static_groups else None
    sweep = _Sweep(grid, group, block, order, factor, static)
    sweep.run(weight.T[order].float().contiguous())  # (in, out): a column is contiguous
    logical = torch.empty_like(sweep.codes)
    logical[order] = sweep.codes
    scales, zeros = sweep.scales.T, sweep.zeros.T
    if static_groups or group == columns or not act_order:
        return assemble(grid, group, logical.T, scales, zeros, origin=origin)
    return _reordered(grid, group, order, logical, scales, zeros, origin)


def _reordered(
    grid: IntegerGrid, group: int, order: Tensor, logical: Tensor, scales: Tensor, zeros: Tensor, origin: str
) -> QuantizedTensor:
    """Groups one after another, ascending columns within each: the order a reader of g_idx restores."""
    group_of = torch.empty_like(order)
    group_of[order] = torch.arange(len(order)) // group
    stored = group_of.argsort(stable=True)
    trivial = torch.equal(stored, torch.arange(len(order)))
    return assemble(grid, group, logical[stored].T, scales, zeros, None if trivial else stored, origin)


class _Sweep:
    """The pass over the columns in order of work; fills codes (in, out), scales and zeros (groups, out)."""

    def __init__(
        self,
        grid: IntegerGrid,
        group: int,
        block: int,
        order: Tensor,
        factor: Tensor,
        static: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.grid, self.group, self.factor = grid, group, factor
        # A block holds whole groups or lies within one: a group's first column then sees all changes so far.
        self.block = max(block // group, 1) * group if group <= block else block
        self.static = static is not None
        self.columns = len(order)
        self.group_of = (order // group if self.static else torch.arange(self.columns) // group).tolist()
        if static is not None:
            self.scales, self.zeros = (numbers.T.contiguous() for numbers in static)

    def run(self, remaining: Tensor) -> None:
        """``remaining`` (in, out) is used up."""
        columns, out = remaining.shape
        self.codes = torch.empty(columns, out)
        if not self.static:
            self.scales = torch.empty(-(-columns // self.group), out)
            self.zeros = torch.empty_like(self.scales)
        for start, stop in self._blocks():
            errors = self._round_block(remaining, start, stop)
            if stop < columns:
                remaining[stop:].addmm_(self.factor[start:stop, stop:].T, errors, alpha=-1)

    def _blocks(self) -> list[tuple[int, int]]:
        """Blocks that respect the borders of groups."""
        outer = max(self.group, self.block)
        found = []
        for first in range(0, self.columns, outer):
            last = min(first + outer, self.columns)
            found += [(start, min(start + self.block, last)) for start in range(first, last, self.block)]
        return found

    def _round_block(self, remaining: Tensor, start: int, stop: int) -> Tensor:
        """Round columns start … stop - 1; (stop - start, out) errors over the factor's diagonal."""
        errors = torch.empty(stop - start, remaining.shape[1])
        diagonal = self.factor.diagonal()[start:stop].tolist()
        for column in range(start, stop):
            group = self.group_of[column]
            if not self.static and column % self.group == 0:
                ahead = remaining[column : column + self.group]
                self.scales[group], self.zeros[group] = self.grid.fit(ahead.T)
            scale, zero = self.scales[group], self.zeros[group]
            codes = self.grid.encode(remaining[column], scale, zero)
            self.codes[column] = codes
            error = errors[column - start]
            torch.sub(remaining[column], self.grid.decode(codes, scale, zero), out=error)
            error /= diagonal[column - start]
            remaining[column + 1 : stop].addr_(self.factor[column, column + 1 : stop], error, alpha=-1)
        return errors


def inverse_factor(hessian: Tensor, damp: float, origin: str = "") -> Tensor:
    """float32 upper triangular U (in, in) with Uᵀ U = (H + damping)⁻¹, computed in float64."""
    wide = hessian.to(torch.float64, copy=True)
    diagonal = wide.diagonal()
    dead = diagonal == 0  # never any input
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    diagonal[dead] = mean
    added = 0.0
    for _ in range(_DAMPING_TRIES):
        diagonal += damp * mean - added
        added = damp * mean
        lower, failed = torch.linalg.cholesky_ex(wide.flip(0, 1))
        if not failed:
            identity = torch.eye(len(wide), dtype=torch.float64)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
            if bool(factor.isfinite().all()):
                return factor
        damp = max(10 * damp, 1e-4)
    raise LowbitError(
        "E0442",
        f"{origin}: the Hessian of this layer's inputs has no Cholesky factor even with {damp / 10:g} of its "
        "mean added to the diagonal; calibrate with other or more text",
    )
