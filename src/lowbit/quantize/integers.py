"""Integer methods without data: rtn (int2 … int8), w8a8_int8, blockwise_int8.

rtn            groups of columns, f16 scales; symmetric: max|x| / (2^(bits-1) - 1/2); else unsigned codes
               with an integer zero point. Both as compressed-tensors 0.20 has them for float32 weights and
               float16 scales, bit by bit; but a scale below float16's smallest is that number, not 0
w8a8_int8      int8 a row, float32 scale max|w| / 127; inputs int8 a token, max|x| / 127
blockwise_int8 int8 in 128 x 128 blocks, inputs int8 in groups of 128
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Scheme
from lowbit.quantize.method import Coded, Method, Module, Quantized, group_size, number, sliced
from lowbit.quantize.rounding import blocked, largest, round_range, scaled_codes, stored_scale
from lowbit.quantize.specification import MethodSpec

_BLOCK = 128


@dataclass(frozen=True)
class RoundToNearest:
    """``bits``-bit integers in groups of columns."""

    spec: MethodSpec

    def refuses(self, module: Module) -> str | None:
        """Where the group size does not divide the columns."""
        size = group_size(self.spec.options, module.shape[1])
        return size if isinstance(size, str) else None

    def scheme_of(self, module: Module) -> Scheme:
        """f16 scales; 8 bits without a group size: one a row."""
        bits, symmetric = number(self.spec.options, "bits"), bool(self.spec.options["symmetric"])
        fmt = number_format(f"int{bits}" if symmetric else f"uint{bits}")
        return Scheme(
            fmt, ((1, self._size(module)),), (number_format("f16"),), zero="none" if symmetric else "integer"
        )

    def _size(self, module: Module) -> int:
        size = group_size(self.spec.options, module.shape[1])
        assert isinstance(size, int), "refuses() was asked first"
        return size

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """Each group by itself."""
        scheme, size = self.scheme_of(module), self._size(module)
        bits = number(self.spec.options, "bits")

        def symmetric(rows: Tensor) -> Coded:
            scale = stored_scale(largest(rows, size) / ((2**bits - 1) / 2), torch.float16)
            return Coded(scaled_codes(rows, scale.float(), size, scheme.weight), (scale,))

        def asymmetric(rows: Tensor) -> Coded:
            ranged = round_range(rows, size, bits, torch.float16)
            return Coded(ranged.codes, (ranged.scale,), ranged.zero)

        encode = symmetric if scheme.zero == "none" else asymmetric
        return Quantized(sliced(scheme, weight, origin, encode))


@dataclass(frozen=True)
class Int8:
    """int8 weights with float32 scales and int8 inputs."""

    spec: MethodSpec
    blocks: bool

    def refuses(self, module: Module) -> str | None:
        """Never: ragged blocks are short ones."""
        return None

    def scheme_of(self, module: Module) -> Scheme:
        """A scale a row, or a 128 x 128 block."""
        int8, f32 = number_format("int8"), number_format("f32")
        if self.blocks:
            inputs = ActivationScheme(int8, (1, _BLOCK), limit=127.0)
            return Scheme(int8, ((_BLOCK, _BLOCK),), (f32,), activation=inputs)
        token = ActivationScheme(int8, (1, 0), limit=127.0) if self._quantizes_inputs else None
        return Scheme(int8, ((1, 0),), (f32,), activation=token)

    @property
    def _quantizes_inputs(self) -> bool:
        return self.spec.options.get("activation") != "none"

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """max|w| / 127, codes in -127 … 127."""
        scheme = self.scheme_of(module)

        def by_row(rows: Tensor) -> Coded:
            scale = largest(rows, 0) / 127
            return Coded(scaled_codes(rows, scale, 0, scheme.weight), (scale,))

        def by_block(rows: Tensor) -> Coded:
            scale = block_largest(rows, _BLOCK) / 127
            return Coded(
                scaled_codes(rows, spread_rows(scale, _BLOCK, len(rows)), _BLOCK, scheme.weight), (scale,)
            )

        encode = by_block if self.blocks else by_row
        return Quantized(sliced(scheme, weight, origin, encode, multiple=_BLOCK if self.blocks else 1))


def block_largest(rows: Tensor, size: int) -> Tensor:
    """float32 (row blocks, column blocks): the largest |x| of size x size blocks, ragged ones included."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % size))
    return blocked(padded, size).unflatten(0, (-1, size)).abs().amax((1, 3))


def spread_rows(per_block: Tensor, size: int, rows: int) -> Tensor:
    """(row blocks, columns) -> (rows, columns)."""
    return per_block.repeat_interleave(size, 0)[:rows]


def build(spec: MethodSpec) -> Method:
    """The method of a specification."""
    if spec.name == "w8a8_int8":
        return Int8(spec, blocks=False)
    if spec.name == "blockwise_int8":
        return Int8(spec, blocks=True)
    return RoundToNearest(spec)
