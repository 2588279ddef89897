"""Quantizing a layer's input as its checkpoint asks: dynamic per token, per group, static; NVFP4, MX, int8.

What is computed is exactly ``Q(x) @ W.T``: codes of x times their scale, multiplied by the stored weight.
Where a token has one scale, the product runs on the codes themselves (integers to 128 and e4m3 values are
exact in bfloat16, the precision native kernels take inputs in) and its result is scaled; otherwise x is
replaced by its dequantized value. LLM.int8's outlier columns stand beside the codes as x over the token's
scale, so that one product does for both.

A token's result does not depend on its neighbours, except where ``ActivationScheme.depends_on_batch`` says
so: dynamic per-tensor scales, one for all tokens of a batch, delayed scales (``activation_state``), LLM.int8.
A batch is the rows of one call: the tokens of a step, or those of them that an expert gets. NaN stays NaN
under every rule; infinity becomes NaN or stays infinite where scales are dynamic (NVFP4's saturate). Where
tokens depend on each other, those that hold either have no part in it (but for delayed scales), so that what
went wrong in one request fails that request alone.

The torch functions here are the definition; float32 on a CPU runs in native code (``activation_native``) with
the same bits, and a GPU has kernels of its own (``gpu.activation_quant``).

Sources: LLM.int8 (Dettmers et al., 2022); OCP Microscaling Formats v1.0; "FP8 Formats for Deep Learning"
(Micikevicius et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.kernels.activation_native import Buffers, NativeQuantizer
from lowbit.kernels.activation_state import ActivationState
from lowbit.kernels.gpu import runtime
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.kernels.rotation import Rotator, same
from lowbit.numerics.number_formats import NumberFormat, nearest_code
from lowbit.numerics.scheme import ActivationScheme

if TYPE_CHECKING:
    from lowbit.kernels.gpu.activation_quant import GpuQuantizer


@dataclass(frozen=True)
class Staged:
    """An input that waits for what ranks saw of it. ``seen``: (tokens, 1 or 2), of a row in parts the largest
    of each part's. ``finish``: called once with those largest, gives what a transform's call gives."""

    seen: Tensor
    finish: Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class InputTransform:
    """What happens to x (tokens, in) before it meets a weight.

    ``rotation``: x is rotated first. ``multiplier``: float32 (in,), x is multiplied by it. ``static_scale``,
    ``static_zero``: scalar tensors of a static scheme; for NVFP4 and FP-Quant the outer scale. ``state``: of
    a delayed scheme. ``across``: the ranks that x lies on, some columns on each, where a scale is found from
    more than stands together (``sees_whole_rows``): they tell each other once what they saw of each row, and
    of delayed schemes at the end of a step (``activation_state``).
    """

    scheme: ActivationScheme | None = None
    multiplier: Tensor | None = None
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    state: ActivationState | None = None
    across: Parallel = ALONE
    rotation: Rotator | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x', factor): the layer computes ``(x' @ W.T) * factor``; factor is (tokens, 1), scalar or None."""
        if runtime.runs_on(x.device):
            return self._on_gpu(x)
        if x.is_cpu and x.dtype is torch.float32 and x.stride(1) == 1:
            if self.native is not None:
                changed, factor = self.native(x)
                return changed, self.static_scale if self.is_static else factor
            if self.halves is not None:
                staged = self.stage(x)
                return staged.finish(self.across.largest(staged.seen))
        return self.in_torch(x)

    def stage(self, x: Tensor) -> Staged:
        """What a call does before ranks tell each other what they saw, of a transform that asks them."""
        assert self.asks_ranks and self.scheme is not None, "else a call is all there is"
        halves = self.halves
        if halves is not None and x.is_cpu and x.dtype is torch.float32 and x.stride(1) == 1:
            staged, seen = halves.stage(x)
            return Staged(seen, lambda seen: (staged, halves.finish(staged, seen)))
        scheme, ready = self.scheme, self._before_codes(self._rotated(x))
        return Staged(_seen(ready.float(), scheme), lambda seen: _by_scales(ready, scheme, seen))

    def _on_gpu(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.rotation is not None and self.scheme is None and self.multiplier is None:
            return self.rotation.rotated(x, x.dtype), None
        if self.gpu is not None and self.gpu.takes(x):
            return self.gpu(x)
        return self._unrotated(x if self.rotation is None else self.rotation.rotated(x, torch.float32))

    @cached_property
    def gpu(self) -> GpuQuantizer | None:
        """The same in GPU kernels, where it can be told; asked for only where there are such."""
        from lowbit.kernels.gpu.activation_quant import GpuQuantizer

        return GpuQuantizer.of(self)

    @property
    def is_static(self) -> bool:
        """Whether a product is scaled by ``static_scale``."""
        return self.scheme is not None and self.scheme.mode == "static" and not self.scheme.block[1]

    @property
    def sees_whole_rows(self) -> bool:
        """Whether a column's code depends on columns that need not stand near it."""
        return self.scheme is not None and self.scheme.mode != "static" and not self.scheme.block[1]

    @property
    def asks_ranks(self) -> bool:
        """Whether x can only be quantized once other ranks have said what they saw of it."""
        return self.across.size > 1 and self.sees_whole_rows and not self._is_delayed

    @property
    def _is_delayed(self) -> bool:
        return self.scheme is not None and self.scheme.mode == "delayed"

    @cached_property
    def native(self) -> NativeQuantizer | None:
        """The same in one native call, where it can be told."""
        return None if self.asks_ranks else self._native()

    @cached_property
    def halves(self) -> NativeQuantizer | None:
        """The same in two native calls, between which ranks tell each other what they saw."""
        return self._native() if self.asks_ranks else None

    def _native(self) -> NativeQuantizer | None:
        state, zero = self.state, self.static_zero
        buffers = Buffers(
            self.multiplier,
            None if self.static_scale is None else self.static_scale.float(),
            None if zero is None else zero.float(),
            None if state is None else state.scale,
            None if state is None else state.amax_history,
            self.rotation,
        )
        if self.scheme is not None and self.scheme.mode == "static" and self.static_scale is None:
            return None
        return NativeQuantizer.of(self.scheme, buffers, 0.0 if self.scheme is None else limit_of(self.scheme))

    def in_torch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The definition of what a call does, in torch on any device."""
        return self._unrotated(self._rotated(x))

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else self.rotation.rotation(x)

    def _before_codes(self, x: Tensor) -> Tensor:
        """Of rotated x what is quantized."""
        if self.multiplier is not None:
            x = x * self.multiplier
        return x.bfloat16().float() if self.scheme is not None and self.scheme.input == "bf16" else x

    def _unrotated(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What follows the rotation."""
        scheme, x = self.scheme, self._before_codes(x)
        if scheme is None:
            return x, None
        if scheme.block[1]:
            return _grouped(x, scheme, self.static_scale), None
        if scheme.mode == "static":
            return self._static(x, scheme)
        if scheme.mode == "delayed":
            return self._delayed(x.float(), scheme)
        return _by_scales(x, scheme, self.across.largest(_seen(x.float(), scheme)))

    def _static(self, x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
        assert self.static_scale is not None, "a static scheme comes with its scale"
        x = x.float()
        scale = self.static_scale.float()
        # A scale of zero (an input that was never seen in calibration) leaves only zeros.
        steps = torch.where(scale == 0, torch.zeros_like(x), x / scale)
        if self.static_zero is None:
            return _nearest(steps, scheme.number_format), scale
        zero = self.static_zero.float()
        return _nearest(steps + zero, scheme.number_format) - zero, scale

    def _delayed(self, x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
        assert self.state is not None, "a delayed scheme comes with its state"
        codes = _nearest(x * self.state.scale, scheme.number_format)
        factor = 1.0 / self.state.scale
        if x.numel():
            self.state.note(x.abs().amax().reshape(1))
        return codes, factor

    @property
    def gives_int8(self) -> bool:
        """Whether what it makes of x are whole numbers of -128 … 127."""
        scheme = self.scheme
        if scheme is None or scheme.block[1] or scheme.outliers or not scheme.symmetric:
            return False
        fmt = scheme.number_format
        return fmt.is_integer and fmt.name.startswith("int") and fmt.bits <= 8 and self.static_zero is None

    def same_as(self, other: InputTransform) -> bool:
        """Whether both do the same to every x."""
        if self.state is not other.state or self.across is not other.across:
            return False
        if not same(self.rotation, other.rotation):
            return False
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


def limit_of(scheme: ActivationScheme) -> float:
    """The code value a block's largest |x| becomes."""
    if scheme.limit:
        return scheme.limit
    values = scheme.number_format.values
    assert values is not None, "activations are quantized to a format with a table"
    return max(value for value in values if math.isfinite(value))


def _seen(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """(tokens, 1 or 2): what scales depend on. The largest |x|, and of LLM.int8 the largest that is no
    outlier; of a zero point how far x reaches below and above 0. Of a row in parts they are the largest of
    each part's."""
    if not scheme.symmetric:
        return torch.stack((-x.amin(-1), x.amax(-1)), -1)
    size = x.abs()
    largest = size.amax(-1, keepdim=True)
    if not scheme.outliers:
        return largest
    return torch.cat((largest, torch.where(size >= scheme.outliers, 0.0, size).amax(-1, keepdim=True)), -1)


def _by_scales(x: Tensor, scheme: ActivationScheme, seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """x quantized with the scales that follow from what was seen of whole rows."""
    if scheme.outliers:
        return _beside_columns(x, scheme, seen)
    if scheme.block[0] == 0 and scheme.symmetric:
        return _per_tensor(x.float(), scheme, seen)
    return _per_token(x.float(), scheme, seen)


def _per_token(x: Tensor, scheme: ActivationScheme, seen: Tensor) -> tuple[Tensor, Tensor]:
    """One scale a token."""
    if not scheme.symmetric:
        return _asymmetric(x, scheme, seen)
    scale = _scale(seen, scheme)
    return _codes(x, scale, scheme), scale


def _beside_columns(x: Tensor, scheme: ActivationScheme, seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """LLM.int8: one scale a token, for codes and for the columns that are not rounded.

    Tokens that are not finite become NaN and make no column an outlier. A column over a token's scale may be
    too large for float16: there it is the dequantized x.
    """
    wide = x.float()
    finite = torch.isfinite(seen[:, :1])  # (tokens, 1)
    columns = ((wide.abs() >= scheme.outliers) & finite).any(0)  # (in,)
    scale = _scale(seen[:, 1:], scheme)
    steps = _steps(wide, scale, scheme)
    codes = torch.where(finite, torch.where(columns, steps, _nearest(steps, scheme.number_format)), math.nan)
    if x.dtype is torch.float16:
        return torch.where(columns & finite, wide, codes * scale), None
    return codes, scale


def _per_tensor(x: Tensor, scheme: ActivationScheme, seen: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all tokens that are finite; the others become NaN."""
    if x.numel() == 0:
        return x, torch.ones(1, device=x.device)
    finite = torch.isfinite(seen)  # (tokens, 1)
    scale = _scale(torch.where(finite, seen, 0.0).amax().reshape(1), scheme)
    return torch.where(finite, _codes(x, scale, scheme), math.nan), scale


def _codes(x: Tensor, scale: Tensor, scheme: ActivationScheme) -> Tensor:
    """The nearest codes of x, float32."""
    return _nearest(_steps(x, scale, scheme), scheme.number_format)


def _steps(x: Tensor, scale: Tensor, scheme: ActivationScheme) -> Tensor:
    """float32 x in units of its scale."""
    return x * (1.0 / scale) if scheme.reciprocal else x / scale


def _asymmetric(x: Tensor, scheme: ActivationScheme, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Integers with a zero point for each token; 0 is always representable."""
    levels = 2 ** int(scheme.number_format.bits)
    low, high = (-seen[:, :1]).clamp(max=0), seen[:, 1:].clamp(min=0)
    scale = (high - low) / (levels - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-levels // 2 - low / scale).round().clamp(-levels // 2, levels // 2 - 1)
    return _nearest(x / scale + zero, scheme.number_format) - zero, scale


def _scale(amax: Tensor, scheme: ActivationScheme) -> Tensor:
    """The scale of blocks whose largest |x| is ``amax``; 1 where all are zero, or one is NaN."""
    if scheme.upper_bound:
        amax = amax.clamp(max=scheme.upper_bound)
    if scheme.scale.name == "e8m0":
        if scheme.limit:  # DeepSeek's ue8m0: the next power of two, nothing saturates
            mantissa, exponent = torch.frexp(amax / scheme.limit)
            exponent = exponent - (mantissa == 0.5).int()
        else:  # OCP MX: largest power of two in the block over the format's own
            mantissa, exponent = torch.frexp(amax)
            exponent = exponent - math.frexp(limit_of(scheme))[1]
            if scheme.round_up:
                exponent = exponent + (2 * mantissa >= scheme.round_up)
        exponent = torch.where(amax.isinf(), 127, exponent.clamp(-127, 127))
        scale = torch.exp2(exponent.float()).masked_fill(amax.isnan(), 1.0)
    else:
        scale = amax / limit_of(scheme)
        if scheme.scale.name == "bf16":
            scale = scale.bfloat16().float()
    if scheme.floor:
        return scale.clamp(min=scheme.floor).masked_fill(scale.isnan(), 1.0)
    return torch.where(scale > 0, scale, 1.0).masked_fill(amax == 0, 1.0)


def _grouped(x: Tensor, scheme: ActivationScheme, outer: Tensor | None) -> Tensor:
    """x quantized and dequantized in groups of columns, the last one perhaps shorter."""
    if x.numel() == 0:
        return x.float()
    codes, scale = grouped_codes(x, scheme, outer)
    return (codes * scale).flatten(-2)[:, : x.shape[1]]


def grouped_codes(x: Tensor, scheme: ActivationScheme, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 codes (tokens, groups, columns of a group) and their scales (tokens, groups, 1).

    Behind x's last column codes are those of 0. ``outer`` may be of each token (tokens, 1, 1).
    """
    columns = x.shape[1]
    size = scheme.block[1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % size))
    groups = padded.unflatten(-1, (-1, size))  # (tokens, groups, size)
    amax = groups.abs().amax(-1, keepdim=True)
    if scheme.scale.name == "e4m3":  # NVFP4: e4m3 scales under one float32
        global_scale = torch.ones(()) if outer is None else outer.float()
        inner = (amax / (limit_of(scheme) * global_scale)).clamp(2.0**-9, 448.0)
        scale = inner.to(torch.float8_e4m3fn).float() * global_scale
        scale = torch.where(scale == 0, 1.0, scale)
    else:
        scale = _scale_of_spread(groups, scheme.spread) if scheme.spread else _scale(amax, scheme)
        scale = scale if outer is None else scale * outer.float()
    return _codes(groups, scale, scheme), scale


def _scale_of_spread(groups: Tensor, spread: float) -> Tensor:
    """(tokens, groups, columns) -> (tokens, groups, 1): a power of two. Sums are of halves."""
    size, sums = groups.shape[-1], torch.stack((groups, groups * groups))
    while sums.shape[-1] > 1:
        first, second = sums.chunk(2, -1)
        sums = first + second
    mean, variance = sums[0] / size, sums[1] / size
    variance = variance - mean * mean
    wanted = spread * torch.where(variance > 0, variance, variance * 0.0).sqrt() + 1e-8
    exponent = torch.where(wanted.isnan(), 0, torch.frexp(wanted)[1] - 1)
    exponent = torch.where(sums[1].isinf(), 127, exponent.clamp(-127, 127))
    return torch.exp2(exponent.float())


def _nearest(steps: Tensor, fmt: NumberFormat) -> Tensor:
    """float32: the nearest value of the format, saturating."""
    if fmt.is_integer:
        low = -(1 << int(fmt.bits) - 1) if fmt.name.startswith("int") else 0
        return steps.round().clamp(low, low + (1 << int(fmt.bits)) - 1)
    if fmt.name == "e4m3":
        return steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    values = fmt.table(steps.device)[nearest_code(steps, fmt).long()]
    return torch.where(steps.isnan(), steps.float(), values)
