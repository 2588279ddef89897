"""bitsandbytes 0.50: nf4 and fp4 (QLoRA: Dettmers et al., 2023), LLM.int8 (Dettmers et al., 2022).

4 bits. The weight is flattened row by row and cut in blocks of 64, each under its largest |w|; where a row is
whole blocks they are plain 1 x 64 blocks. Codes are nearest to w * (1 / largest), midpoints and products in
float32, a tie to the lower value; a last block of fewer than 64 weights divides instead of multiplying.

Double quantization. The largest values less their mean are codes of an 8-bit map in blocks of 256; the map
has 7 exponents with 1, 2, 4 … 64 numbers each. The canonical scales are what the codes are worth in float32,
so that a writer stores them as plain float32 ``absmax`` and loses nothing. The codes are the tool's own
torch definition (and its GPU kernels'); its CPU library looks values up in 65,536 steps and so takes a
neighbour for about one in 700.

int8. The weight in float16, codes w * (127 / largest), one scale a row; columns of inputs with a number of 6
or more stay floats (``numerics.llm_int8``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.llm_int8 import INT8_STEP, llm_int8_inputs
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.method import Coded, Method, Module, Quantized, sliced
from lowbit.quantize.specification import MethodSpec

_BLOCK = 64
_NESTED_BLOCK = 256
_SMALLEST_DIVISOR = 1e-38
_FORMATS = {"nf4": "nf4", "fp4": "fp4_bnb"}


@dataclass(frozen=True)
class FourBit:
    """nf4 or fp4 in blocks of 64 of the flattened weight."""

    spec: MethodSpec

    def refuses(self, module: Module) -> str | None:
        """Never: blocks may cross rows."""
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """Blocks of a row, or of the flattened matrix where they do not divide it."""
        fmt = number_format(_FORMATS[str(self.spec.options["type"])])
        flattened = module.shape[1] % _BLOCK != 0
        return Scheme(fmt, ((1, _BLOCK),), (number_format("f32"),), flattened=flattened)

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Rows are cut where a block ends."""
        scheme, columns = self.scheme_of(module), weight.shape[1]

        def encode(rows: Tensor) -> Coded:
            steps, largest = _blockwise(rows.flatten(), _BLOCK)
            codes = _nearest(steps, *_table(scheme.weight)).view_as(rows)
            return Coded(codes, (largest if scheme.flattened else largest.view(len(rows), -1),))

        whole = _BLOCK // math.gcd(columns, _BLOCK)
        quantized = sliced(scheme, weight, origin, encode, multiple=whole)
        if self.spec.options["double_quant"]:
            (largest,) = quantized.scales
            quantized = replace(quantized, scales=(requantized_scales(largest.flatten()).view_as(largest),))
        return Quantized(quantized)


@dataclass(frozen=True)
class Int8:
    """LLM.int8: rows of int8, tokens of int8 beside outlier columns in full precision."""

    spec: MethodSpec

    def refuses(self, module: Module) -> str | None:
        """Never: any matrix has rows."""
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """As the reader of saved LLM.int8 models has it."""
        int8 = number_format("int8")
        return Scheme(int8, ((1, 0),), (number_format("f32"),), activation=llm_int8_inputs())

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Through float16, as the tool casts."""

        def encode(rows: Tensor) -> Coded:
            half = rows.half()
            largest = half.abs().amax(1, keepdim=True).float()
            if not largest.isfinite().all():
                raise LowbitError(
                    "E0215",
                    f"{origin}: has weights beyond 65504, the largest float16, in which LLM.int8 "
                    "quantizes; use another method for this module",
                )
            steps = torch.where(largest > 0, half * (127.0 / largest), 0.0)
            return Coded((steps.round() + 128).to(torch.uint8), (largest * INT8_STEP,))

        return Quantized(sliced(self.scheme_of(module), weight, origin, encode))


def _blockwise(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """float32 (n,) -> each number in units of its block's largest, -1 … 1, and those (blocks,)."""
    whole = len(flat) - len(flat) % size
    blocks = flat[:whole].view(-1, size)
    largest = blocks.abs().amax(-1)
    steps = (blocks * (1.0 / largest.clamp(min=_SMALLEST_DIVISOR)).unsqueeze(-1)).clamp(-1, 1).flatten()
    if whole < len(flat):
        last = flat[whole:].abs().amax().clamp(min=_SMALLEST_DIVISOR)
        largest = torch.cat((largest, last.unsqueeze(0)))
        steps = torch.cat((steps, (flat[whole:] / last).clamp(-1, 1)))
    return steps, largest


def _nearest(steps: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    """uint8: the code of the nearest of the sorted float32 values, a tie to the lower."""
    middles = (values[:-1] + values[1:]) / 2
    return codes[torch.bucketize(steps, middles)]


@cache
def _table(fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """The format's values in order, and the uint8 code of each."""
    values, order = fmt.table().sort(stable=True)
    return values, order.to(torch.uint8)


@cache
def dynamic_map() -> Tensor:
    """float32 (256,), sorted: the numbers an 8-bit scale may be (Dettmers, 2016: dynamic tree quantization).

    Exponent i of 0 … 6 has 2^i evenly spaced numbers of either sign below 10^(i - 6), then there are 0 and 1.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6)) * ((borders[:-1] + borders[1:]) / 2)
        numbers += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32)


def requantized_scales(largest: Tensor) -> Tensor:
    """float32 (blocks,): what scales are worth after 8 bits: map[code] * outer + mean."""
    mean = largest.mean()
    table = dynamic_map()
    steps, outer = _blockwise(largest - mean, _NESTED_BLOCK)
    values = table[_nearest(steps, table, torch.arange(256))]
    return values * outer.repeat_interleave(_NESTED_BLOCK)[: len(values)] + mean


def build(spec: MethodSpec) -> Method:
    """The method of a specification."""
    return Int8(spec) if spec.options["type"] == "int8" else FourBit(spec)
