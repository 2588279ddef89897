"""Method: what turns one float weight into a QuantizedTensor, and what it is told about the weight.

A method sees one module at a time, as the checkpoint stores it. It says what scheme the weight would get
(``scheme_of``: planning needs no numbers), or why it cannot take it (``refuses``), and does it
(``quantize``). What its inputs are quantized to stands in the scheme's ``activation``, as with offline
checkpoints.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.gguf_mixes import ModelFacts
from lowbit.quantize.specification import MethodSpec, Value

Role = Literal["linear", "expert", "router", "head", "embedding"]

SLICE_WEIGHTS = 1 << 20  # weights quantized at once: 4 MiB of float32 and as much again for each temporary


@dataclass(frozen=True)
class Module:
    """One float weight (out, in) of the model.

    ``name``: the model's name for it, ``model.layers.0.mlp.down_proj``. ``dtype``: how it is stored, f32,
    f16 or bf16. ``gguf_name``: what GGUF calls it, or "" where it has no name for it. ``largest``: the
    largest |w| of all weights that have one outer scale with it; 0: it has its own.
    """

    name: str
    shape: tuple[int, int]
    dtype: str = "bf16"
    role: Role = "linear"
    gguf_name: str = ""
    facts: ModelFacts = field(default_factory=lambda: ModelFacts(layers=1, heads=1, kv_heads=1))
    largest: float = 0.0


@dataclass(frozen=True)
class Quantized:
    """A quantized weight, and the scale of static inputs where the method has one (float32 scalar)."""

    weight: QuantizedTensor
    static_scale: Tensor | None = None


class Method(Protocol):
    """An online method with its options."""

    @property
    def spec(self) -> MethodSpec:
        """What was asked for."""

    def refuses(self, module: Module) -> str | None:
        """Why this module cannot have the scheme ("needs in % 32 == 0, got 100"), or None."""

    def scheme_of(self, module: Module) -> Scheme:
        """The scheme the module gets; ``refuses`` was asked."""

    def quantize(self, weight: Tensor, module: Module, origin: str) -> Quantized:
        """weight (out, in) in its stored dtype -> canonical form."""


@cache
def _builders(module: str) -> Callable[[MethodSpec], Method]:
    builder: Callable[[MethodSpec], Method] = importlib.import_module(f"lowbit.quantize.{module}").build
    return builder


def build_method(spec: MethodSpec) -> Method:
    """The method of a checked specification."""
    return _builders(spec.entry.module)(spec)


@dataclass(frozen=True)
class Coded:
    """Some rows quantized: what ``sliced`` puts together. Shapes as in QuantizedTensor."""

    codes: Tensor  # uint8 (rows, in), or (rows, row bytes)
    scales: tuple[Tensor, ...] = ()
    zeros: Tensor | None = None
    offsets: tuple[Tensor, ...] = ()


def slices(weight: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """float32 copies of a few rows at a time, cut at multiples of ``multiple`` rows."""
    for rows in raw_slices(weight, multiple):
        yield rows.float()


def raw_slices(weight: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """A few rows at a time in their own dtype."""
    step = max(SLICE_WEIGHTS // weight.shape[1] // multiple, 1) * multiple
    for start in range(0, weight.shape[0], step):
        yield weight[start : start + step]


def largest_weight(weight: Tensor) -> float:
    """max |w|, a few rows at a time."""
    return max(float(rows.abs().max()) for rows in raw_slices(weight))


def check_finite(rows: Tensor, origin: str, start: int = 0) -> None:
    """E0215 where a weight is NaN or infinite: its block would be. ``start``: the first row's number."""
    wrong = ~rows.isfinite()
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise LowbitError(
            "E0215",
            f"{origin}: the weight in row {start + row}, column {column} is {rows[row, column].item()}: no "
            "scale covers it. Download the model again, or keep this module in floats",
        )


def sliced(
    scheme: Scheme,
    weight: Tensor,
    origin: str,
    encode: Callable[[Tensor], Coded],
    *,
    multiple: int = 1,
    raw: bool = False,
) -> QuantizedTensor:
    """The weight quantized a few rows at a time, so that temporaries stay small beside the result.

    ``encode`` gets float32 rows (``raw``: in their stored dtype); ``multiple``: rows that belong together.
    Scales of the last axis' blocks are joined along rows; flattened ones along their only axis.
    Weights that are NaN or infinite are refused (E0215).
    """
    parts, start = [], 0
    codes: Tensor | None = None  # written in place: joined at the end they would be there twice
    for rows in (raw_slices if raw else slices)(weight, multiple):
        check_finite(rows, origin, start)
        part = encode(rows)
        if codes is None:
            codes = part.codes.new_empty(weight.shape[0], part.codes.shape[1])
        codes[start : start + len(rows)] = part.codes
        parts.append(replace(part, codes=part.codes.new_empty(0)))
        start += len(rows)

    def join(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 0)

    first = parts[0]
    assert codes is not None, "a weight has rows"
    return QuantizedTensor(
        scheme,
        (weight.shape[0], weight.shape[1]),
        codes,
        tuple(join([part.scales[level] for part in parts]) for level in range(len(first.scales))),
        None if first.zeros is None else join([part.zeros for part in parts if part.zeros is not None]),
        tuple(join([part.offsets[level] for part in parts]) for level in range(len(first.offsets))),
        origin=origin,
    )


def number(options: Mapping[str, Value | None], name: str) -> int:
    """A whole-number option that has a value."""
    value = options[name]
    assert isinstance(value, int), "checked by the specification"
    return value


def largest_group(columns: int, limit: int = 128) -> int | None:
    """The largest power of two up to ``limit`` that divides the columns, 16 at least; None: there is none."""
    size = limit
    while size >= 16:
        if columns % size == 0:
            return size
        size //= 2
    return None


def group_size(options: Mapping[str, Value | None], columns: int) -> int | str:
    """Columns under one scale, 0 for all of them, or why the wanted size is impossible."""
    wanted = options.get("group_size")
    if wanted is None:
        return largest_group(columns) or 0
    assert isinstance(wanted, int), "checked by the specification"
    if wanted in (-1, 0):
        return 0
    if columns % wanted:
        fitting = [size for size in (256, 128, 64, 32, 16) if columns % size == 0]
        use = f"; {', '.join(map(str, fitting))} would" if fitting else ""
        return f"group size {wanted} does not divide its {columns} columns{use}"
    return wanted
