"""A layer of one 8-bit weight whose checkpoint quantizes inputs, on the GPU: codes of x, product, the rest.

Two launches, or three where the columns are split: x becomes codes and scales (``activation_quant``), and the
product's tiles end with scales, bias and gate (``eight_bit``). For LLM.int8 one before them finds its outlier
columns; where x is rotated, one may be needed for that. What it computes is what the layer's steps do one by
one, in another order of float32 operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.gpu import eight_bit, runtime
from lowbit.kernels.gpu.activation_quant import GpuQuantizer
from lowbit.kernels.gpu.eight_bit import EightBitWeight
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.scheme import ActivationScheme

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GpuLayer:
    """``weight`` with what its layer does around it."""

    weight: PackedWeight
    quantizer: GpuQuantizer
    operand: EightBitWeight
    bias: Tensor | None
    narrow_bias: Tensor | None  # the same in bfloat16, where that is exact

    @staticmethod
    def of(weight: PackedWeight, transform: InputTransform | None, bias: Tensor | None) -> GpuLayer | None:
        """None where the steps run one by one. Asked at load: it looks at numbers."""
        if weight.kernel.name != "gpu_blocks" or transform is None or transform.scheme is None:
            return None
        quantizer = transform.gpu
        if quantizer is None or not meet(weight, transform.scheme, quantizer.static_zero):
            return None
        taken = operand(weight, quantizer.group, quantizer.has_zeros)
        if taken is None or (transform.scheme.outliers and taken.group):
            return None
        if bias is None:
            return GpuLayer(weight, quantizer, taken, None, None)
        wide = bias.float().contiguous()
        narrow = wide.bfloat16()
        return GpuLayer(weight, quantizer, taken, wide, narrow if torch.equal(narrow.float(), wide) else None)

    def takes(self, x: Tensor, out: Tensor | None = None) -> bool:
        """Whether x and the result lie as the kernels read and write them."""
        return all(
            runtime.runs_on(t.device) and t.dtype in _TYPES and t.dim() == 2 and t.stride(1) == 1
            for t in (x, out)
            if t is not None
        )

    @property
    def halves(self) -> bool:
        """Whether its rows can be a gate's and as many others'."""
        return self.weight.shape[0] % 2 == 0

    def __call__(self, x: Tensor, out: Tensor | None = None, activation: str | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out); with an activation activation(gate) * up, half as wide."""
        tokens, columns = x.shape
        if columns != self.weight.shape[1]:
            raise LowbitError(
                "E0703", f"{self.weight.origin}: input has {columns} columns, weight {self.weight.shape[1]}"
            )
        width = self.weight.shape[0] // (1 if activation is None else 2)
        if out is None:
            out = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
        assert out.shape == (tokens, width) and self.takes(x, out), "asked before"
        if not tokens:
            return out
        return eight_bit.multiply(
            self.quantizer.codes(x),
            self.quantizer.group,
            self.operand,
            self.bias,
            self.narrow_bias,
            out,
            activation,
        )


def meet(weight: PackedWeight, scheme: ActivationScheme, zeros: Tensor | None) -> bool:
    """Whether both sides are codes that tensor cores multiply. ``zeros``: of an input with static ones."""
    held, buffers = weight.scheme, weight.buffers
    given, codes = scheme.number_format, buffers.get("codes")
    if codes is None or held.offset or held.flattened or held.reordered or "column_order" in buffers:
        return False
    if codes.dtype is torch.int8:
        if not given.is_integer or weight.shape[1] > eight_bit.MOST_WHOLE_COLUMNS:
            return False
        if zeros is not None and bool(zeros.frac().any()):
            return False
        # As stored they are the canonical codes less 128: the values, where that is the zero point.
        if held.zero == "integer":
            return bool((buffers["zeros"] == 128).all())
        return held.zero == "none" and held.weight.name == "int8"
    floats = ("e4m3", "e5m2")
    return held.zero == "none" and held.weight.name in floats and given.name in floats


def operand(weight: PackedWeight, given: int, has_zeros: bool) -> EightBitWeight | None:
    """The weight with float32 scales; None where they lie otherwise than the kernels read them.

    ``given``: columns of x that share a scale, 0: all; ``has_zeros``: whether its codes have zero points.
    """
    out, columns = weight.shape
    codes = weight.buffers["codes"]
    of_rows: Tensor | None = None  # float32 (out,) or (1,)
    grouped: tuple[Tensor, int, int] | None = None
    for level, (rows, group) in enumerate(weight.scheme.blocks):
        scale = _decoded(weight.buffers[f"scale{level}"], weight.scheme.scales[level].name)
        if group and group < columns:
            if grouped is not None:
                return None
            grouped = scale, rows or out, group
            continue
        flat = scale.flatten()
        if flat.numel() != 1 and rows > 1:
            flat = flat.repeat_interleave(rows)[:out]
        of_rows = flat if of_rows is None else of_rows * flat
    if of_rows is None:
        of_rows = torch.ones(1, device=codes.device)
    if grouped is None:
        if given and given < eight_bit.LEAST_GROUP:
            return None
        one = of_rows if of_rows.numel() == 1 else None
        sums = codes.sum(1, dtype=torch.int32) if has_zeros else None
        return EightBitWeight(codes, of_rows.expand(out).contiguous(), sums=sums, one_scale=one)
    scale, rows, group = grouped
    narrow, wide = sorted((group, given or group))
    if has_zeros or narrow < eight_bit.LEAST_GROUP or narrow & narrow - 1 or wide % narrow:
        return None
    if of_rows.numel() != 1:
        if rows != 1:
            return None
        of_rows = of_rows[:, None]
    return EightBitWeight(codes, (scale * of_rows).contiguous(), group, rows)


def _decoded(scale: Tensor, name: str) -> Tensor:
    """float32; e8m0 and e4m3 may be bytes."""
    kinds = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
    if name in kinds:
        return scale.cpu().view(kinds[name]).float().to(scale.device)
    return scale.float()
