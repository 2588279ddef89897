"""Scheme: everything about a quantized weight but its numbers, as one hashable value.

Its short spelling, ``str(scheme)``, is what ``lowbit inspect`` prints and kernels quote when they refuse:
``int4 1x128 asym f16`` is 4-bit codes, one f16 scale and one integer zero point for 128 columns of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lowbit.numerics.number_formats import NumberFormat, RowVectorLayout, number_format
from lowbit.numerics.trellis import BLOCK


@dataclass(frozen=True)
class Delay:
    """Delayed scaling (FP8 recipes): the scale follows the largest |x| of the last ``length`` steps.

    ``algorithm``: "max" of all of them, or only the "most_recent". The scale is 2^``margin`` times smaller
    than it could be.
    """

    length: int = 1024
    margin: int = 0
    algorithm: Literal["max", "most_recent"] = "max"

    def __post_init__(self) -> None:
        assert self.length >= 1, "a history has at least the step in progress"


@dataclass(frozen=True)
class ActivationScheme:
    """How a scheme wants its input x (tokens, columns) quantized before the product.

    One scale for ``block`` = (tokens, columns), 0 = all: (1, 0) is per token, (0, 0) per tensor: dynamically,
    one scale for all the tokens of a batch. ``limit``: the code value the largest |x| of a block becomes
    (127, 127.5, 448, 6); 0 means the format's largest. ``scale``: what the scale itself is rounded to (f32:
    not at all; bf16; e8m0: a power of two; e4m3: NVFP4, under the static outer scale). ``round_up``: beside
    e8m0, a largest |x| of at least so many times a power of two counts as the next one (compressed-tensors;
    0: never, as OCP has it). ``upper_bound``: largest |x| a scale takes account of (fbgemm), 0 = none.
    ``outliers``: columns in which any token of the batch is at least this large are not rounded (LLM.int8),
    0 = none.

    ``input`` "bf16": x is rounded to bfloat16 first (torchao, beside ``scale`` bf16). ``floor``: the smallest
    scale; 0: none, and a block of zeros has scale 1. ``reciprocal``: codes are x times 1 / scale, whose last
    bit differs from x / scale (torchao's int8). ``delay``: of mode "delayed". ``spread``: beside e8m0, a
    scale is the largest power of two up to so many standard deviations of its block (FP-Quant's "quest"),
    0: it follows the largest |x|.
    """

    number_format: NumberFormat
    block: tuple[int, int]
    mode: Literal["static", "dynamic", "delayed"] = "dynamic"
    symmetric: bool = True
    limit: float = 0.0
    scale: NumberFormat = field(default_factory=lambda: number_format("f32"))
    round_up: float = 0.0
    upper_bound: float = 0.0
    outliers: float = 0.0
    input: Literal["", "bf16"] = ""
    floor: float = 0.0
    reciprocal: bool = False
    delay: Delay | None = None
    spread: float = 0.0

    def __post_init__(self) -> None:
        whole = self.block[1] in (2, 4, 8, 16, 32, 64) and self.scale.name == "e8m0"
        assert not self.spread or whole, "deviations are of blocks that are a power of two"
        assert (self.delay is not None) == (self.mode == "delayed"), "mode delayed says how"
        assert self.mode != "delayed" or self.block == (0, 0), "delayed scales are per tensor"
        per_token = self.mode == "dynamic" and self.block == (1, 0) and self.symmetric
        assert not self.outliers or per_token, "outlier columns stand beside symmetric scales of tokens"
        if self.limit and self.mode != "delayed" and self.scale.name != "e8m0":
            # One spelling of the same rule. Beside e8m0 a limit says how its exponent is rounded.
            values = self.number_format.values or ()
            if self.limit == max((value for value in values if math.isfinite(value)), default=0.0):
                object.__setattr__(self, "limit", 0.0)

    @property
    def depends_on_batch(self) -> str:
        """Why a token's result depends on what is computed beside or before it; "" where it does not."""
        if self.outliers:
            return "LLM.int8's outlier columns are those of all tokens of a step"
        if self.mode == "delayed":
            return "delayed scales follow the inputs of earlier steps"
        if self.mode == "dynamic" and self.block[0] == 0:
            return "one dynamic scale for all tokens of a step"
        return ""

    def __str__(self) -> str:
        rows, columns = ("all" if size == 0 else str(size) for size in self.block)
        shape = "" if self.symmetric else " asym"
        scale = "" if self.scale.name == "f32" else f" {self.scale.name}"
        outliers = f" outliers {self.outliers:g}" if self.outliers else ""
        spread = f" spread {self.spread:.3g}" if self.spread else ""
        return f"{self.number_format.name} {rows}x{columns} {self.mode}{scale}{shape}{outliers}{spread}"


@dataclass(frozen=True)
class RotationScheme:
    """A layer's input, or what it gives, in blocks of ``size`` columns, each times a matrix at run time.

    ``kind``: "hadamard", or what the checkpoint calls it ("random-hadamard", "random-matrix").
    """

    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"


@dataclass(frozen=True)
class Scheme:
    """The layout and meaning of a ``QuantizedTensor``.

    ``blocks`` has one (rows, columns) for each scale level, inner first, 0 meaning the whole axis;
    ``scales`` the number format each level is stored in. ``flattened``: blocks run over the row-major
    flattened matrix (bitsandbytes 4-bit), and then a block is (1, weights). ``offset`` says that weights
    also have additive offsets in weight units, at the same levels. ``reordered``: columns are stored in
    another order than the input's (GPTQ act-order). ``scattered``: the rows of a block of several do not lie
    beside one another, ``QuantizedTensor.row_groups`` says which they are (HQQ's axis 0); there may be fewer
    of them than its height. A dense weight has no scales: ``bf16``. ``rotation``: of the layer's input,
    before ``activation``; ``output_rotation``: of its result, bias included. ``output``: what its result is
    rounded to, bias included, by a static scale (quanto). ``outliers``: some weights have a number of their
    own in this format that is added to what codes and scales give, and every difference, product and sum of
    the equation is rounded to the format (SpQR). ``outlier_share``: how many weights have
    one; it tells sizes and nothing else, so that schemes that differ in it alone are equal.
    """

    weight: NumberFormat
    blocks: tuple[tuple[int, int], ...] = ()
    scales: tuple[NumberFormat, ...] = ()
    zero: Literal["none", "integer", "float"] = "none"
    offset: bool = False
    flattened: bool = False
    reordered: bool = False
    activation: ActivationScheme | None = None
    rotation: RotationScheme | None = None
    output_rotation: RotationScheme | None = None
    output: ActivationScheme | None = None
    scattered: bool = False
    outliers: NumberFormat | None = None
    outlier_share: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        assert len(self.blocks) == len(self.scales), "one block for each scale level"
        tall = any(rows > 1 for rows, _ in self.blocks)
        assert not self.scattered or (tall and not self.flattened), "scattered rows are those of blocks"
        alone = len(self.scales) == 1 and not self.offset
        assert self.outliers is None or alone, "outliers stand beside one level of scales"

    @property
    def is_dense(self) -> bool:
        """A plain f32, f16 or bf16 matrix."""
        return self.weight.name in ("f32", "f16", "bf16")

    @property
    def weight_alone(self) -> Scheme:
        """Without what its layer does to inputs and outputs: what kernels see."""
        if self.activation is self.rotation is self.output_rotation is self.output is None:
            return self
        return replace(self, activation=None, rotation=None, output_rotation=None, output=None)

    @property
    def rotated(self) -> str:
        """How its layer rotates its input and output, in words; "" where it does not."""
        said = [f"input rotated by {self.rotation}"] * (self.rotation is not None)
        said += [f"output rotated by {self.output_rotation}"] * (self.output_rotation is not None)
        return ", ".join(said)

    @property
    def rows_move(self) -> bool:
        """Whether rows can change places: no two share a scale by where they lie that not all share."""
        if self.flattened or self.rows_together != 1:
            return False
        return self.scattered or all(rows <= 1 for rows, _ in self.blocks)

    @property
    def rows_together(self) -> int:
        """So many neighbouring rows mean something together only, beside what shares a scale; 0: all."""
        vectors = self.weight.vectors
        if self.weight.lattice is not None:
            return 0 if len(self.scales) == 2 else 1
        if self.weight.trellis is not None:
            return BLOCK
        return 1 if vectors is None else vectors.height

    @property
    def decoded(self) -> Scheme:
        """Codebooks, trellises and outliers as a matrix of their numbers' or scales' type, lattices as
        float16, anything else as it is."""
        vectors = self.weight.vectors
        if self.outliers is not None:
            return dense(self.outliers.name)
        if self.weight.lattice is not None:
            return dense("f16")
        if vectors is None and self.weight.trellis is None:
            return self
        return dense(vectors.dtype if isinstance(vectors, RowVectorLayout) else self.scales[0].name)

    @property
    def written(self) -> Scheme:
        """What files are written of it: no writer has vectors of rows, outliers or rounded outputs."""
        if self.output is not None:
            return replace(self, output=None).written
        return self.decoded if self.weight.is_tall or self.outliers is not None else self

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of a block of each level (0: all), and ``rows_together``: rows are cut between them."""
        return (*(rows for rows, _ in self.blocks), self.rows_together)

    @property
    def whole_columns(self) -> bool:
        """Whether a column has one scale for all rows: row by row there would be one for each weight."""
        return any(rows == 0 and columns == 1 for rows, columns in self.blocks)

    @property
    def scales_columns(self) -> bool:
        """Whether the outermost scales are of one column of several rows: kernels let x take them over."""
        rows, columns = self.blocks[-1] if self.blocks else (1, 0)
        return not self.flattened and rows != 1 and columns == 1

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits for each weight of a matrix ``shape`` (..., out, in), scales and zeros included."""
        out, columns = shape[-2], shape[-1]

        def share(level: int) -> float:
            rows, width = self.blocks[level]
            if self.flattened:
                return -(-out * columns // width) / (out * columns)
            return -(-out // (rows or out)) * -(-columns // (width or columns)) / (out * columns)

        bits, vectors = float(self.weight.bits), self.weight.vectors
        if self.weight.trellis is not None:  # whole blocks, and their scales
            whole = self.weight.trellis.whole(shape)
            bits *= math.prod(whole)
            for scale, size in zip(self.scales, whole, strict=True):
                bits += scale.bits * size
            return bits / (out * columns)
        if vectors is not None:  # whole ones, also at the end
            bits = 8 * vectors.row_bytes(columns) * -(-out // vectors.height) / (out * columns)
        for level, scale in enumerate(self.scales):
            bits += scale.bits * share(level) * (2 if self.offset else 1)
        if self.zero != "none":
            width = self.weight.bits if self.zero == "integer" else self.scales[0].bits
            bits += width * share(0)
        if self.outliers is not None:  # each with its column, and where those of a row begin
            bits += (16 + self.outliers.bits) * self.outlier_share + 32 * (out + 1) / (out * columns)
        return bits

    def __str__(self) -> str:
        words = [self.weight.name.removeprefix("gguf_")]
        for (rows, columns), scale in zip(self.blocks, self.scales, strict=True):
            words.append(f"{rows or 'all'}x{columns or 'all'} {scale.name}")
        if self.zero != "none":
            words.append("asym" if self.zero == "integer" else "float-zero")
        words += ["offset"] * self.offset + ["flat"] * self.flattened
        words += ["act-order"] * self.reordered + ["scattered"] * self.scattered
        words += [] if self.outliers is None else [f"outliers {self.outliers.name}"]
        if self.rotated:
            words.append(f"({self.rotated})")
        if self.activation is not None:
            words.append(f"(input {self.activation})")
        if self.output is not None:
            words.append(f"(output {self.output})")
        return " ".join(words)


def dense(name: str) -> Scheme:
    """The scheme of a plain matrix: ``dense("bf16")``."""
    return Scheme(number_format(name))
