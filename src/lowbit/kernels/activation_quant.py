"""Quantizing a layer's input as its checkpoint asks: dynamic per token, per group, static; NVFP4, MX, int8.

What is computed is exactly ``Q(x) @ W.T``: codes of x times their scale, multiplied by the stored weight.
Where a token has one scale, the product runs on the codes themselves (integers to 128 and e4m3 values are
exact in bfloat16, the precision native kernels take inputs in) and its result is scaled; otherwise x is
replaced by its dequantized value. A token's result never depends on its neighbours: LLM.int8's outlier
*columns* become outlier *elements* here, which is the same for a single token and keeps more precision
beside others, and dynamic per-tensor scales are taken per token.

Sources: formats.md 3; LLM.int8 (Dettmers et al., 2022); OCP Microscaling Formats v1.0; "FP8 Formats for
Deep Learning" (Micikevicius et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.number_formats import NumberFormat, nearest_code
from lowbit.numerics.scheme import ActivationScheme


@dataclass(frozen=True, eq=False)
class InputTransform:
    """What happens to x (tokens, in) before it meets a weight.

    ``multiplier``: float32 (in,), x is multiplied by it first. ``static_scale``, ``static_zero``: scalar
    tensors of a static scheme; for NVFP4 the outer scale.
    """

    scheme: ActivationScheme | None = None
    multiplier: Tensor | None = None
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x', factor): the layer computes ``(x' @ W.T) * factor``; factor is (tokens, 1), scalar or None."""
        if self.multiplier is not None:
            x = x * self.multiplier
        if self.scheme is None:
            return x, None
        columns = self.scheme.block[1]
        if columns:
            return _grouped(x, self.scheme, self.static_scale), None
        if self.scheme.mode == "static":
            return self._static(x, self.scheme)
        return _per_token(x, self.scheme)

    def _static(self, x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
        assert self.static_scale is not None, "a static scheme comes with its scale"
        scale = self.static_scale.float()
        # A scale of zero (an input that was never seen in calibration) leaves only zeros.
        steps = torch.where(scale == 0, torch.zeros_like(x), x / scale)
        if self.static_zero is None:
            return _nearest(steps, scheme.number_format), scale
        zero = self.static_zero.float()
        return _nearest(steps + zero, scheme.number_format) - zero, scale

    def same_as(self, other: InputTransform) -> bool:
        """Whether both do the same to every x."""
        return self.scheme == other.scheme and all(
            _same(a, b)
            for a, b in (
                (self.multiplier, other.multiplier),
                (self.static_scale, other.static_scale),
                (self.static_zero, other.static_zero),
            )
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _limit(scheme: ActivationScheme) -> float:
    """The code value a block's largest |x| becomes."""
    if scheme.limit:
        return scheme.limit
    values = scheme.number_format.values
    assert values is not None, "activations are quantized to a format with a table"
    return max(value for value in values if value == value)  # not NaN


def _per_token(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor | None]:
    """One scale a token; with outliers the dequantized x."""
    x = x.float()
    inner = x if not scheme.outliers else torch.where(x.abs() >= scheme.outliers, 0.0, x)
    if not scheme.symmetric:
        return _asymmetric(inner, scheme)
    amax = inner.abs().amax(-1, keepdim=True)
    if scheme.upper_bound:
        amax = amax.clamp(max=scheme.upper_bound)
    scale = _scale(amax, scheme)
    codes = _nearest(inner / scale, scheme.number_format)
    if not scheme.outliers:
        return codes, scale
    return torch.where(x.abs() >= scheme.outliers, x, codes * scale), None


def _asymmetric(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Integers with a zero point for each token; 0 is always representable."""
    levels = 2 ** int(scheme.number_format.bits)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (levels - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-levels // 2 - low / scale).round().clamp(-levels // 2, levels // 2 - 1)
    return _nearest(x / scale + zero, scheme.number_format) - zero, scale


def _scale(amax: Tensor, scheme: ActivationScheme) -> Tensor:
    """The scale of blocks whose largest |x| is ``amax``; 1 where all are zero."""
    if scheme.scale.name == "e8m0":
        if scheme.limit:  # DeepSeek's ue8m0: the next power of two, nothing saturates
            exponent = (amax / scheme.limit).log2().ceil()
        else:  # OCP MX: largest power of two in the block over the format's own
            mantissa, exponent = torch.frexp(amax)
            exponent = exponent - torch.frexp(torch.tensor(_limit(scheme)))[1]
            if scheme.round_up:
                exponent = exponent + (2 * mantissa >= scheme.round_up)
        scale = torch.exp2(exponent.float().clamp(-127, 127))
    else:
        scale = amax / _limit(scheme)
    return torch.where(scale > 0, scale, 1.0).masked_fill(amax == 0, 1.0)


def _grouped(x: Tensor, scheme: ActivationScheme, outer: Tensor | None) -> Tensor:
    """x quantized and dequantized in groups of columns, the last one perhaps shorter."""
    columns = x.shape[1]
    size = scheme.block[1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % size))
    groups = padded.unflatten(-1, (-1, size))  # (tokens, groups, size)
    amax = groups.abs().amax(-1, keepdim=True)
    if scheme.scale.name == "e4m3":  # NVFP4: e4m3 scales under one float32
        global_scale = torch.ones(()) if outer is None else outer.float()
        inner = (amax / (_limit(scheme) * global_scale)).clamp(2.0**-9, 448.0)
        scale = inner.to(torch.float8_e4m3fn).float() * global_scale
        scale = torch.where(scale == 0, 1.0, scale)
    else:
        scale = _scale(amax, scheme)
    values = _nearest(groups / scale, scheme.number_format) * scale
    return values.flatten(-2)[:, :columns]


def _nearest(steps: Tensor, fmt: NumberFormat) -> Tensor:
    """float32: the nearest value of the format, saturating."""
    if fmt.is_integer:
        low = -(1 << int(fmt.bits) - 1) if fmt.name.startswith("int") else 0
        return steps.round().clamp(low, low + (1 << int(fmt.bits)) - 1)
    if fmt.name == "e4m3":
        return steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return fmt.table(steps.device)[nearest_code(steps, fmt).long()]
