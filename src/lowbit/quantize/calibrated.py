"""gptq, awq and marlin: the methods that look at text (``calibration``), as a recipe sees them.

``loading.quantizing`` runs them over the whole model and keeps the result; here is what a module will get,
and for planning an estimate of its error: that of rounding to nearest, which calibration only improves on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.numerics.scheme import Scheme
from lowbit.quantize.calibration import CalibrationOptions
from lowbit.quantize.integer_grid import IntegerGrid, columns_of_group, round_to_nearest
from lowbit.quantize.method import Module, Quantized, group_size
from lowbit.quantize.specification import MethodSpec


@dataclass(frozen=True)
class Calibrated:
    """GPTQ or AWQ on the grid of ``options``."""

    spec: MethodSpec
    options: CalibrationOptions

    @property
    def _grid(self) -> IntegerGrid:
        return IntegerGrid(self.options.bits, self.options.symmetric)

    def refuses(self, module: Module) -> str | None:
        """Where groups do not fit, or the files of these methods cannot hold the shape."""
        size = group_size(self.spec.options, module.shape[1])
        if isinstance(size, str):
            return size
        out, columns = module.shape
        packed = (out,) if self.options.method == "awq" else (out, columns)  # AWQ packs along rows only
        if any(count * self.options.bits % 32 for count in packed):
            return f"{out} x {columns} codes of {self.options.bits} bits are no whole words"
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """Groups of columns with f16 scales."""
        columns = module.shape[1]
        return self._grid.scheme(columns_of_group(self.options.group_size, columns), columns)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Without data: round to nearest, on the same grid."""
        group = columns_of_group(self.options.group_size, weight.shape[1])
        return Quantized(round_to_nearest(weight.float(), self._grid, group, origin))


def build(spec: MethodSpec) -> Calibrated:
    """The method of a specification."""
    return Calibrated(spec, options_of(spec))


def options_of(spec: MethodSpec) -> CalibrationOptions:
    """How to calibrate; awq has 4 bits and zero points."""
    chosen = spec.options
    size, bits = chosen.get("group_size"), chosen.get("bits", 4)
    assert (size is None or isinstance(size, int)) and isinstance(bits, int), "checked by the specification"
    awq = spec.name.startswith("awq")
    return CalibrationOptions(
        "awq" if awq else "gptq",
        bits=bits,
        group_size=-1 if size == 0 else size,
        symmetric=bool(chosen.get("symmetric", not awq)),
        act_order=bool(chosen.get("act_order", False)),
    )
