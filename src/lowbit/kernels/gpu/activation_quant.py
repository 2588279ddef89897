"""Quantizing inputs on the GPU: what ``InputTransform.in_torch`` defines, in one pass over x or two.

The kernels lie in ``input_codes``. Codes and scales are those of the definition on a CPU, bit for bit, but
for the sign of zeros. (torch itself, on CUDA, divides by a number as a product with its reciprocal: there the
definition's own last bit may differ.)

Nothing waits for the device, and no grid depends on what x holds: every call can be part of a CUDA graph.
LLM.int8's outlier columns are found there too (``outlier_columns``).

x is rotated first, in a launch of its own (``rotation``) or by the one that quantizes, where its programs
have whole blocks: Hadamard matrices of 16 to 128 columns before groups of columns that divide them, and of
all columns of a row, 256 to 8,192, before one scale a token.

Where columns of a row lie on several ranks these tell each other once what a scale depends on, between two
launches: its largest |x|, or of zero points how far it reaches below and above 0. LLM.int8 takes a launch
more there: which columns hold outliers hangs on what other ranks saw of their rows.

Two kinds of results: x' and its factor as ``InputTransform`` gives them, or codes and scales for 8-bit
products (``layer``). Codes cannot all say NaN, so there the scale of a row or group that holds one is NaN:
its product is NaN in every column, as it is by the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from lowbit.kernels.activation_quant import limit_of
from lowbit.kernels.gpu import outlier_columns, rotation, runtime
from lowbit.kernels.gpu.input_codes import find_ends, find_peaks, quantize, update_delayed
from lowbit.kernels.gpu.outlier_columns import Outliers

if TYPE_CHECKING:
    from lowbit.kernels.activation_quant import InputTransform
    from lowbit.kernels.activation_state import ActivationState

# Mantissa bits and exponent bias.
_FLOATS = {"e4m3": (3, 7), "e5m2": (2, 15), "e2m1": (1, 1), "e2m3": (3, 1), "e3m2": (2, 3)}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# A row is read in blocks of columns; its second reading comes from the cache.
_MOST_BLOCK = 4096
# Columns a program has where groups have their own scales: 16 blocks of the largest rotation.
_GROUPED_BLOCK = 2048
_NUMBERS = ("limit", "floor", "upper_bound", "round_up", "low", "high", "levels")  # in ``quantize``'s order


@dataclass(frozen=True)
class Codes:
    """x as 8-bit codes: value = (code - zero) * scale, NaN where the scale is.

    ``codes``: int8 or an 8-bit float (rows, columns); ``scales``: float32 (rows,), or (groups, rows) where
    groups of columns have their own; ``zeros``: int32 (rows,); ``factor``: (1,), of a scale that all share.
    ``outliers``: columns whose codes are zero, and what x is there.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    factor: Tensor | None
    outliers: Outliers | None = None


@dataclass(frozen=True, eq=False)
class GpuQuantizer:
    """One transform as these kernels know it."""

    transform: InputTransform
    rule: str
    numbers: dict[str, float]
    constants: dict[str, Any]
    static_scale: Tensor | None
    static_zero: Tensor | None

    @staticmethod
    def of(transform: InputTransform) -> GpuQuantizer | None:
        """None where the transform runs in torch."""
        scheme, multiplier = transform.scheme, transform.multiplier
        if multiplier is not None and not (multiplier.dtype is torch.float32 and multiplier.is_contiguous()):
            return None
        constants: dict[str, Any] = {"GROUP": 0}
        if scheme is None:
            constants |= {"BF16": False, "RECIPROCAL": False}
            constants |= {"SCALE": "f32", "MANTISSA": 0, "BIAS": 0, "OFFSET": 0}
            numbers = dict.fromkeys(_NUMBERS, 0.0)
            return GpuQuantizer(transform, "none", numbers, constants, None, None)
        given = [tensor for tensor in (transform.static_scale, transform.static_zero) if tensor is not None]
        group, fmt = scheme.block[1], scheme.number_format
        if any(tensor.numel() != 1 for tensor in given):
            return None
        if scheme.outliers and (multiplier is not None or (fmt.name, scheme.scale.name) != ("int8", "f32")):
            return None
        if scheme.mode == "static" and not group and transform.static_scale is None:
            return None
        if group & group - 1 or scheme.scale.name not in ("f32", "bf16", "e8m0", "e4m3"):
            return None
        if scheme.scale.name == "e4m3" and not group:
            return None
        if scheme.scale.name == "e8m0" and (scheme.spread or transform.static_scale is not None):
            return None
        mantissa, bias = _FLOATS.get(fmt.name, (0, 0))
        offset = 0
        if fmt.is_integer and fmt.bits <= 8:
            low = float(-(1 << int(fmt.bits) - 1) if fmt.name.startswith("int") else 0)
            high = low + (1 << int(fmt.bits)) - 1
            offset = 128 if low == 0 else 0
        elif mantissa:
            high = max(value for value in fmt.values or () if abs(value) < 1e30)
            low = -high
        else:
            return None
        limit = limit_of(scheme)
        numbers = {
            "limit": limit,
            "floor": scheme.floor,
            "upper_bound": scheme.upper_bound or math.inf,
            "round_up": scheme.round_up or 2.0,  # a mantissa is less
            "low": low,
            "high": high,
            "levels": 2.0 ** int(fmt.bits),
        }
        constants |= {
            "SCALE": "e8m0_up" if scheme.scale.name == "e8m0" and scheme.limit else scheme.scale.name,
            "MANTISSA": mantissa,
            "BIAS": bias,
            "BF16": scheme.input == "bf16",
            "RECIPROCAL": scheme.reciprocal,
            "OFFSET": offset,
        }
        if group:
            rule = "grouped"
            constants["GROUP"] = group
        else:
            rule = scheme.mode
            if scheme.mode == "dynamic":
                rule = "asymmetric" if not scheme.symmetric else "token" if scheme.block[0] else "tensor"
                rule = "outliers" if scheme.outliers else rule
        scale, zero = (
            None if tensor is None else tensor.float().reshape(1)
            for tensor in (transform.static_scale, transform.static_zero if rule == "static" else None)
        )
        return GpuQuantizer(transform, rule, numbers, constants, scale, zero)

    @property
    def has_zeros(self) -> bool:
        """Whether raw codes come with zero points."""
        return bool(self.rule == "asymmetric" or self.static_zero is not None or self.constants["OFFSET"])

    @property
    def group(self) -> int:
        """Columns that share a scale; 0: all."""
        return self.transform.scheme.block[1] if self.transform.scheme is not None else 0

    def takes(self, x: Tensor) -> bool:
        """Whether x lies as the kernels read it."""
        return x.dim() == 2 and x.numel() > 0 and x.dtype in _TYPES and x.stride(1) == 1

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (rows, columns) -> x' of its type and the factor, as ``InputTransform`` gives them."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x = self._turned(x)
        if self.rule == "grouped":
            self._groups(x, out, None)
            return out, None
        if self.rule == "outliers":
            whole = out.dtype is torch.float16  # which may not hold x over a scale
            scales, _ = self._beside_columns(x, out, whole=whole)
            return out, None if whole else scales[:, None]
        scale = None
        if self.rule in ("token", "asymmetric"):
            scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        factor = self._rows(x, out, scale, None)
        return out, factor if scale is None else scale

    def codes(self, x: Tensor) -> Codes:
        """x (rows, columns) as codes of 8 bits."""
        scheme = self.transform.scheme
        assert scheme is not None, "codes are of a scheme"
        x = self._turned(x)
        rows, columns = x.shape
        out = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
        typed = out.view(torch.int8) if scheme.number_format.is_integer else out
        outliers, zeros, factor = None, None, None
        if self.rule == "grouped":
            groups = -(-columns // self.group)
            scales = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
            self._groups(x, typed, scales)
        elif self.rule == "outliers":
            scales, outliers = self._beside_columns(x, typed, raw=True)
        else:
            scales = torch.empty(rows, dtype=torch.float32, device=x.device)
            zeros = torch.empty(rows, dtype=torch.int32, device=x.device) if self.has_zeros else None
            factor = self._rows(x, typed, scales, zeros, raw=True)
        if not scheme.number_format.is_integer:
            assert scheme.number_format.dtype is not None, "a format of 8 bits"
            typed = out.view(scheme.number_format.dtype)
        return Codes(typed, scales, zeros, factor, outliers)

    def _turned(self, x: Tensor) -> Tensor:
        """x rotated in float32, unless the launch that quantizes does that."""
        rotator = self.transform.rotation
        return x if rotator is None or self._turns(x.shape[1]) else rotator.rotated(x, torch.float32)

    def _turns(self, columns: int) -> bool:
        """Whether the launch that quantizes rows of so many columns rotates them."""
        if self.transform.rotation is None:
            return False
        turn = self.transform.rotation.rotation
        if (
            turn.matrix is not None
            or turn.partners is not None
            or not all(t is None or t.is_contiguous() for t in (turn.before, turn.after))
        ):
            return False
        if self.rule == "grouped":
            return rotation.TILE <= turn.size <= rotation.FACTOR and turn.size % self.group == 0
        whole = self.rule == "token" and self.transform.across.size == 1
        return whole and turn.size == columns and rotation.FACTOR < turn.size <= rotation.IN_A_PROGRAM

    def _rows(
        self, x: Tensor, out: Tensor, scales: Tensor | None, zeros: Tensor | None, raw: bool = False
    ) -> Tensor | None:
        """Into out and its scales; the factor that all rows share, if they do."""
        rows, columns = x.shape
        state, turns = self.transform.state, self._turns(columns)
        block = columns if turns else min(triton.next_power_of_2(columns), _MOST_BLOCK)
        warps = 4 if block <= 1024 else 8
        given, history, seen = self.static_scale, None, None
        factor = given
        if self.rule == "delayed":
            assert state is not None, "a delayed scheme comes with its state"
            given, history = state.scale, state.amax_history.view(torch.int32)
        elif self.rule == "tensor" or self.transform.asks_ranks:
            seen, history = self._seen(x, block, warps)
        if self.rule in ("delayed", "tensor"):
            factor = torch.empty(1, dtype=torch.float32, device=x.device)
        self._launch(
            (rows,),
            x,
            (given, self.static_zero, history, seen),
            (out, scales, zeros, factor),
            turns,
            num_warps=warps,
            RULE=self.rule,
            RAW=raw,
            BLOCK=block,
        )
        return factor

    def _seen(self, x: Tensor, block: int, warps: int) -> tuple[Tensor, Tensor | None]:
        """Of whole rows, wherever their columns lie: int32 (rows,) the bits of their largest |x|, and (1,) of
        all that are finite; with zero points ``find_ends``' float32 (rows, 2)."""
        rows, across = len(x), self.transform.across
        read = {"BF16": self.constants["BF16"], "BLOCK": block}
        given, lies = (x, self.transform.multiplier), (x.shape[1], x.stride(0))
        if self.rule == "asymmetric":
            ends = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
            runtime.launch(find_ends, (rows,), *given, ends, *lies, num_warps=warps, **read)
            return across.largest(ends), None
        largest = torch.zeros(1, dtype=torch.int32, device=x.device)
        peaks = torch.empty(rows, dtype=torch.int32, device=x.device)
        runtime.launch(find_peaks, (rows,), *given, peaks, largest, *lies, num_warps=warps, **read)
        if self.transform.asks_ranks:
            # Of NaN the largest may have any sign.
            peaks = across.largest(peaks.view(torch.float32)).view(torch.int32) & 0x7FFFFFFF
            if self.rule == "tensor":
                largest = torch.where(peaks < 0x7F800000, peaks, 0).amax(0, keepdim=True)
        return peaks, largest

    def _launch(
        self,
        grid: tuple[int, ...],
        x: Tensor,
        read: tuple[Tensor | None, ...],
        written: tuple[Tensor | None, ...],
        turns: bool,
        **constants: Any,
    ) -> None:
        """``quantize`` with all that is the same for every rule; ``turns``: it rotates x."""
        ends: tuple[Tensor | None, ...] = (None, None, None)
        size, divisor, a, half = 0, 1.0, 0, ""
        if turns:
            rotator = self.transform.rotation
            assert rotator is not None, "asked before"
            turn = rotator.rotation
            ends = (turn.before, turn.after, rotation.table(x.device))
            size, divisor, half = turn.size, float(turn.divisor), rotation.half_of(x.dtype, rotator.signs)
            a = rotation.factors(size)[0] if size > rotation.FACTOR else 0
        out = written[0]
        assert out is not None, "codes or values"
        runtime.launch(
            quantize,
            grid,
            *(x, self.transform.multiplier, *read, *ends, *written),
            *(*x.shape, x.stride(0), out.stride(0)),
            *(self.numbers[name] for name in _NUMBERS),
            *(_exponent(self.numbers["high"]), divisor),
            SIZE=size,
            A=a,
            HALF=half,
            STRIDE=rotation.FACTOR,
            SEEN=self.transform.asks_ranks,
            **self.constants,
            **constants,
        )

    def _beside_columns(
        self, x: Tensor, out: Tensor, *, raw: bool = False, whole: bool = False
    ) -> tuple[Tensor, Outliers]:
        """Into out; scales, and the columns that are not rounded."""
        assert self.transform.scheme is not None, "a rule with a threshold"
        threshold = self.transform.scheme.outliers
        return outlier_columns.quantized(
            x, out, self.numbers, self.constants, threshold, self.transform.across, raw=raw, whole=whole
        )

    def _groups(self, x: Tensor, out: Tensor, scales: Tensor | None) -> None:
        rows, columns = x.shape
        turns = self._turns(columns)
        groups = -(-columns // self.group)
        block = max(_GROUPED_BLOCK // self.group, 1)
        if not turns:
            block = min(triton.next_power_of_2(groups), block)
        self._launch(
            (rows, -(-groups // block)),
            x,
            (self.static_scale, None, None, None),
            (out, scales, None, None),
            turns,
            num_warps=4,
            RULE="grouped",
            RAW=scales is not None,
            BLOCK=block,
        )


def _exponent(value: float) -> int:
    """Of the largest power of two in a format's largest value."""
    return math.frexp(value)[1] - 1 if value > 0 else 0


@dataclass(frozen=True)
class DelayedUpdate:
    """The end of a step for many states, in one launch."""

    states: Tensor  # int64 (states, 4): addresses of scale and history, its length, most recent only
    largest: Tensor  # float32 (states,)
    block: int
    kept: tuple[ActivationState, ...]  # the addresses are theirs

    @staticmethod
    def of(states: list[ActivationState]) -> DelayedUpdate:
        """Of states that lie on one device."""
        device = states[0].scale.device
        described = [
            (
                s.scale.data_ptr(),
                s.amax_history.data_ptr(),
                len(s.amax_history),
                s.delay.algorithm == "most_recent",
            )
            for s in states
        ]
        largest = torch.tensor([state.largest for state in states], dtype=torch.float32, device=device)
        block = triton.next_power_of_2(max(len(state.amax_history) for state in states))
        numbers = torch.tensor(described, dtype=torch.int64, device=device)
        return DelayedUpdate(numbers, largest, block, tuple(states))

    def __call__(self) -> None:
        """Update all of them."""
        runtime.launch(update_delayed, (len(self.kept),), self.states, self.largest, BLOCK=self.block)
