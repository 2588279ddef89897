"""Scheme: everything about a quantized weight but its numbers, as one hashable value.

Its short spelling, ``str(scheme)``, is what ``lowbit inspect`` prints and kernels quote when they refuse:
``int4 1x128 asym f16`` is 4-bit codes, one f16 scale and one integer zero point for 128 columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.numerics.number_formats import NumberFormat, number_format


@dataclass(frozen=True)
class ActivationScheme:
    """How a scheme wants its input quantized: one scale for ``block`` = (tokens, columns), 0 = all."""

    number_format: NumberFormat
    block: tuple[int, int]
    mode: Literal["static", "dynamic", "delayed"] = "dynamic"
    symmetric: bool = True

    def __str__(self) -> str:
        rows, columns = ("all" if size == 0 else str(size) for size in self.block)
        shape = "" if self.symmetric else " asym"
        return f"{self.number_format.name} {rows}x{columns} {self.mode}{shape}"


@dataclass(frozen=True)
class Scheme:
    """The layout and meaning of a ``QuantizedTensor``.

    ``blocks`` has one (rows, columns) for each scale level, inner first, 0 meaning the whole axis;
    ``scales`` the number format each level is stored in. ``flattened``: blocks run over the row-major
    flattened matrix (bitsandbytes 4-bit), and then a block is (1, weights). ``offset`` says that weights
    also have additive offsets in weight units, at the same levels. ``reordered``: columns are stored in
    another order than the input's (GPTQ act-order). A dense weight has no scales: ``bf16``.
    """

    weight: NumberFormat
    blocks: tuple[tuple[int, int], ...] = ()
    scales: tuple[NumberFormat, ...] = ()
    zero: Literal["none", "integer", "float"] = "none"
    offset: bool = False
    flattened: bool = False
    reordered: bool = False
    activation: ActivationScheme | None = None

    def __post_init__(self) -> None:
        assert len(self.blocks) == len(self.scales), "one block for each scale level"

    @property
    def is_dense(self) -> bool:
        """A plain f32, f16 or bf16 matrix."""
        return self.weight.name in ("f32", "f16", "bf16")

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits for each weight of a matrix ``shape`` (..., out, in), scales and zeros included."""
        out, columns = shape[-2], shape[-1]
        bits = float(self.weight.bits)
        for (rows, block_columns), scale in zip(self.blocks, self.scales, strict=True):
            covered = (rows or out) * (block_columns or columns)
            bits += scale.bits / covered * (2 if self.offset else 1)
        if self.zero != "none":
            rows, block_columns = self.blocks[0]
            width = self.weight.bits if self.zero == "integer" else 16
            bits += width / ((rows or out) * (block_columns or columns))
        return bits

    def __str__(self) -> str:
        words = [self.weight.name.removeprefix("gguf_")]
        for (rows, columns), scale in zip(self.blocks, self.scales, strict=True):
            words.append(f"{rows or 'all'}x{columns or 'all'} {scale.name}")
        if self.zero != "none":
            words.append("asym" if self.zero == "integer" else "float-zero")
        words += ["offset"] * self.offset + ["flat"] * self.flattened
        words += ["act-order"] * self.reordered
        if self.activation is not None:
            words.append(f"(input {self.activation})")
        return " ".join(words)


def dense(name: str) -> Scheme:
    """The scheme of a plain matrix: ``dense("bf16")``."""
    return Scheme(number_format(name))
