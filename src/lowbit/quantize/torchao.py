"""torchao's nine names, with the weights of torchao 0.18 to their last bit.

    int8wo            scale max|row| / 127.5, at least 2^-23; codes w * (1 / scale) in -128 … 127
    int8dq            the same, inputs too: one scale a token
    fp8wo             e4m3, scale max|row| / 448; codes w / scale
    fp8dq-per_row     the same, inputs too: one scale a token
    fp8dq-per_tensor  one scale for the weight, one for all of a step's inputs
    int4wo-32 … 256   scale (max - min) / 15 of a group, zero = min + 8 * scale (its tinygemm domain):
                      weight = (code - 8) * scale + zero

Largest values and quotients are computed in the weight's own dtype, as torchao does, and only then widened:
in bfloat16 that moves a scale by up to 0.4 %, so an e4m3 code may saturate. int4wo does every step in
bfloat16, which is also the only dtype that it and fp8dq-per_row take; other weights are rounded to it first.
``zero`` is in weight units: an offset, with codes signed.

A layer that torchao's own configuration leaves in floats is refused here, with the reason. One difference: a
row (or weight) of nothing but zeros has scale 0 and codes 0 in fp8, where torchao divides 0 by 0 and stores
NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.torchao_inputs import (
    E4M3_LIMIT,
    INT8_LIMIT,
    SMALLEST_INT8_SCALE,
    float8_inputs,
    int8_inputs,
)
from lowbit.quantize.method import Coded, Method, Module, Quantized, raw_slices, sliced
from lowbit.quantize.rounding import blocked, scaled_codes
from lowbit.quantize.specification import MethodSpec


@dataclass(frozen=True)
class Int8:
    """int8 rows; int8dq: int8 tokens too."""

    spec: MethodSpec

    def refuses(self, module: Module) -> str | None:
        """Never: any matrix has rows."""
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """One float32 scale a row."""
        int8 = number_format("int8")
        inputs = int8_inputs() if self.spec.name == "int8dq" else None
        return Scheme(int8, ((1, 0),), (number_format("f32"),), activation=inputs)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Codes by the reciprocal of the scale, as torchao computes them."""

        def encode(rows: Tensor) -> Coded:
            scale = rows.abs().amax(1, keepdim=True) / INT8_LIMIT
            scale = scale.clamp(min=SMALLEST_INT8_SCALE).float()
            steps = (rows * (1.0 / scale)).round().clamp(-128, 127)
            return Coded((steps + 128).to(torch.uint8), (scale,))

        return Quantized(sliced(self.scheme_of(module), weight, origin, encode, raw=True))


@dataclass(frozen=True)
class Float8:
    """e4m3, a scale for each row or one for all."""

    spec: MethodSpec

    @property
    def _whole(self) -> bool:
        return self.spec.name == "fp8dq-per_tensor"

    def refuses(self, module: Module) -> str | None:
        """fp8dq: what its matrix product cannot take."""
        out, columns = module.shape
        if self.spec.name != "fp8wo" and (out % 16 or columns % 16):
            return f"torchao leaves it in floats: needs out % 16 == 0 and in % 16 == 0, got {out} x {columns}"
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """float32 scales; fp8dq: inputs by the same rule."""
        e4m3, block = number_format("e4m3"), (0, 0) if self._whole else (1, 0)
        inputs = None if self.spec.name == "fp8wo" else float8_inputs(block)
        return Scheme(e4m3, (block,), (number_format("f32"),), activation=inputs)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """max / 448 in the weight's dtype."""
        scheme = self.scheme_of(module)

        def by_row(rows: Tensor) -> Coded:
            if self.spec.name == "fp8dq-per_row":
                rows = rows.bfloat16()
            scale = (rows.abs().amax(1, keepdim=True) / E4M3_LIMIT).float()
            return Coded(scaled_codes(rows.float(), scale, 0, scheme.weight), (scale,))

        if not self._whole:
            return Quantized(sliced(scheme, weight, origin, by_row, raw=True))
        largest = torch.stack([rows.abs().max() for rows in raw_slices(weight)]).max()
        scale = (largest / E4M3_LIMIT).float().reshape(1, 1)

        def whole(rows: Tensor) -> Coded:
            return Coded(scaled_codes(rows, scale, 0, scheme.weight))

        return Quantized(replace(sliced(scheme, weight, origin, whole), scales=(scale,)))


@dataclass(frozen=True)
class Int4:
    """4-bit codes in groups of columns, bfloat16 scales and offsets."""

    spec: MethodSpec
    group: int

    def refuses(self, module: Module) -> str | None:
        """Where groups do not fit."""
        columns = module.shape[1]
        if columns % self.group:
            return f"torchao leaves it in floats: needs in % {self.group} == 0, got {columns}"
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """Offsets instead of zero points."""
        return Scheme(number_format("int4"), ((1, self.group),), (number_format("bf16"),), offset=True)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Each step rounded to bfloat16; 0 need not be representable."""

        def encode(rows: Tensor) -> Coded:
            groups = blocked(rows.bfloat16(), self.group)
            low, high = groups.amin(-1), groups.amax(-1)
            scale = ((high - low) / 15.0).clamp(min=torch.finfo(torch.bfloat16).smallest_normal)
            zero = low + scale * 8.0
            least = zero - scale * 8.0  # not always ``low``: zero was rounded
            steps = ((groups - least.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15)
            return Coded(steps.to(torch.uint8).flatten(1), (scale,), offsets=(zero,))

        return Quantized(sliced(self.scheme_of(module), weight, origin, encode, raw=True))


def build(spec: MethodSpec) -> Method:
    """The method of one of the nine names."""
    name, _, group = spec.name.partition("-")
    if name == "int4wo":
        return Int4(spec, int(group))
    return Int8(spec) if name.startswith("int8") else Float8(spec)
