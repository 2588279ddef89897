"""Weights of every format for benchmarks/linear.py: one random matrix, quantized by lowbit's own methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.activation_quant import InputTransform
from lowbit.numerics.hadamard import hadamard_factors
from lowbit.numerics.lattice import LatticeLayout
from lowbit.numerics.number_formats import (
    RowVectorLayout,
    VectorLayout,
    number_format,
    trellis_format,
    vector_format,
)
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense
from lowbit.numerics.trellis import BLOCK
from lowbit.quantize.method import Module, build_method
from lowbit.quantize.specification import parse_method

SHAPES = {
    "135M qkv": (960, 576),
    "135M out": (576, 576),
    "135M gate up": (3072, 576),
    "135M down": (576, 1536),
    "135M head": (49152, 576),
    "1B qkv": (3072, 2048),
    "1B out": (2048, 2048),
    "1B gate up": (16384, 2048),
    "1B down": (2048, 8192),
    "8B qkv": (6144, 4096),
    "8B out": (4096, 4096),
    "8B gate up": (28672, 4096),
    "8B down": (4096, 14336),
}
# What is timed if nobody says what: 8B is too much for two cores, and 135M nothing for a GPU.
DEFAULT_SHAPES = {
    "cpu": [name for name in SHAPES if not name.startswith("8B")],
    "cuda": [name for name in SHAPES if name.startswith("8B")],
}


@dataclass(frozen=True)
class Sample:
    """A weight and what its scheme does to inputs."""

    weight: QuantizedTensor
    transform: InputTransform | None


def matrix(shape: tuple[int, int]) -> Tensor:
    """bfloat16 (out, in), the same numbers in every run."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()


def _plain(name: str) -> Callable[[Tensor], Sample]:
    def made(values: Tensor) -> Sample:
        scheme = dense(name)
        cast = values.to(scheme.weight.dtype)
        return Sample(QuantizedTensor(scheme, tuple(values.shape), cast, origin="benchmark"), None)

    return made


def _method(text: str) -> Callable[[Tensor], Sample]:
    """By the online method ``text``; LowbitError where it refuses the shape."""

    def made(values: Tensor) -> Sample:
        method = build_method(parse_method(text))
        rows, columns = values.shape
        module = Module("model.layers.0.mlp.up_proj", (rows, columns), gguf_name="blk.0.ffn_up")
        if reason := method.refuses(module):
            raise LowbitError("E0402", reason)
        weight = method.quantize(values, module, "benchmark").weight
        activation = weight.scheme.activation
        if activation is None:
            return Sample(weight, None)
        alone = replace(weight, scheme=replace(weight.scheme, activation=None))  # as the loader has it
        return Sample(alone, InputTransform(activation))

    return made


def _act_order(text: str) -> Callable[[Tensor], Sample]:
    """The same weight with its columns in an order of their own."""

    def made(values: Tensor) -> Sample:
        weight = _method(text)(values).weight
        order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(7))
        scheme = replace(weight.scheme, reordered=True)
        return Sample(replace(weight, scheme=scheme, column_order=order), None)

    return made


def vectors(books: int, bits: int, length: int, group: int = 0) -> Callable[[Tensor], Sample]:
    """Random indices of codebooks of normal numbers (AQLM, HIGGS), whatever the matrix."""

    def made(values: Tensor) -> Sample:
        rows, columns = values.shape
        return Sample(codebook_weight((rows, columns), books, bits, length, group), None)

    return made


def codebook_weight(
    shape: tuple[int, int], books: int, bits: int, length: int, group: int = 0
) -> QuantizedTensor:
    """Random indices, codebooks of normal numbers and a scale of a power of two for each row, or for each
    ``group`` columns of one."""
    generator = torch.Generator().manual_seed(1)
    fmt, (rows, columns) = vector_format(books, bits, length), shape
    assert isinstance(fmt.vectors, VectorLayout)
    top = 256 if bits in (8, 16) else 1 << bits % 8  # of an index's last byte
    codes = torch.randint(256, (rows, fmt.vectors.row_bytes(columns)), generator=generator)
    last = fmt.vectors.index_bytes
    codes[:, last - 1 :: last] %= top
    groups = columns // group if group else 1
    return QuantizedTensor(
        Scheme(fmt, ((1, group),), (number_format("f16"),)),
        shape,
        codes.to(torch.uint8),
        (torch.exp2(torch.randint(-8, -5, (rows, groups), generator=generator).float()).half(),),
        origin="benchmark",
        codebooks=torch.randn(books, 1 << bits, length, generator=generator).half(),
    )


def row_vectors(length: int, centroids: int, residual: int = 0) -> Callable[[Tensor], Sample]:
    """Random indices of codebooks of vectors of rows (VPTQ), whatever the matrix."""

    def made(values: Tensor) -> Sample:
        rows, columns = values.shape
        return Sample(row_codebook_weight((rows, columns), length, centroids, residual), None)

    return made


def trellis(bits: int, book: str) -> Callable[[Tensor], Sample]:
    """Random bits of a trellis (EXL3), whatever the matrix; all bits are valid."""

    def made(values: Tensor) -> Sample:
        rows, columns = values.shape
        return Sample(trellis_weight((rows, columns), bits, book), None)

    return made


def lattice(divisor: float = 0.0) -> Callable[[Tensor], Sample]:
    """Random codes of a lattice (QuIP#), whatever the matrix; all are valid."""

    def made(values: Tensor) -> Sample:
        rows, columns = values.shape
        return Sample(lattice_weight((rows, columns), divisor), None)

    return made


def row_codebook_weight(
    shape: tuple[int, int], length: int, centroids: int, residual: int = 0
) -> QuantizedTensor:
    """Random indices, codebooks of normal numbers, an order, a scale and an offset for each column.

    ``centroids`` and ``residual`` are 256 or 65,536, or no residual 0.
    """
    generator = torch.Generator().manual_seed(1)
    layout, (rows, columns) = RowVectorLayout(length, centroids, residual), shape
    vectors = (-(-rows // length), layout.row_bytes(columns))
    scales, offsets = torch.rand(2, 1, columns, generator=generator).mul(0.01).add(0.005).half().unbind()
    books = torch.randn(1, centroids + residual, length, generator=generator)
    books[:, centroids:] /= 4
    return QuantizedTensor(
        Scheme(number_format(layout.name), ((0, 1),), (number_format("f16"),), offset=True, reordered=True),
        shape,
        torch.randint(256, vectors, dtype=torch.uint8, generator=generator),
        (scales,),
        offsets=(offsets,),
        column_order=torch.randperm(columns, generator=generator),
        origin="benchmark",
        codebooks=books.half(),
    )


def trellis_weight(shape: tuple[int, int], bits: int, book: str) -> QuantizedTensor:
    """Random bits and scales of powers of two; LowbitError where 128 does not divide the shape."""
    generator = torch.Generator().manual_seed(1)
    fmt, half, (rows, columns) = trellis_format(bits, book), number_format("f16"), shape
    assert fmt.trellis is not None
    if rows % BLOCK or columns % BLOCK:
        raise LowbitError("E0702", f"{rows} x {columns} are no whole blocks of {BLOCK} x {BLOCK}")
    outputs, inputs = (
        torch.exp2(torch.randint(-4, -1, (size,), generator=generator).float()).half()
        for size in (rows, columns)
    )
    return QuantizedTensor(
        Scheme(fmt, ((1, 0), (0, 1)), (half, half)),
        shape,
        torch.randint(256, (rows, fmt.trellis.row_bytes(columns)), generator=generator).to(torch.uint8),
        (outputs.unsqueeze(1), inputs.unsqueeze(0)),
        origin="benchmark",
    )


def lattice_weight(shape: tuple[int, int], divisor: float = 0.0) -> QuantizedTensor:
    """Random codes; LowbitError where there are no Hadamard matrices of the sizes."""
    generator = torch.Generator().manual_seed(1)
    layout, single, (rows, columns) = LatticeLayout(divisor), number_format("f32"), shape
    if rows % 16 or columns % 64 or hadamard_factors(rows) is None or hadamard_factors(columns) is None:
        raise LowbitError(
            "E0702", f"{rows} x {columns} has no Hadamard matrices or no whole tiles of 16 x 64"
        )
    outputs = torch.rand(rows, 1, generator=generator) / (rows * columns) ** 0.5
    inputs = torch.randint(2, (1, columns), generator=generator) * 2.0 - 1
    codes = torch.randint(256, (rows, columns * layout.books // 4), generator=generator)
    scheme = Scheme(number_format(layout.name), ((1, 0), (0, 1)), (single, single))
    return QuantizedTensor(scheme, shape, codes.to(torch.uint8), (outputs, inputs), origin="benchmark")


FORMATS: dict[str, Callable[[Tensor], Sample]] = {
    "bf16": _plain("bf16"),
    "f16": _plain("f16"),
    "int8 channel": _method("w8a8_int8:activation=none"),
    "int4 g32": _method("int4:group_size=32,symmetric=true"),
    "int4 g128": _method("int4:group_size=128,symmetric=true"),
    "awq g128": _method("int4:group_size=128"),
    "gptq act-order": _act_order("int4:group_size=128,symmetric=true"),
    "int3 g64": _method("int3:group_size=64"),
    "int5 g64": _method("int5:group_size=64"),
    "q4_0": _method("gguf:type=q4_0,pure=true"),
    "q4_1": _method("gguf:type=q4_1,pure=true"),
    "q4_k": _method("gguf:type=q4_k_s,pure=true"),
    "q6_k": _method("gguf:type=q6_k,pure=true"),
    "q8_0": _method("gguf:type=q8_0,pure=true"),
    "nf4": _method("nf4"),
    "mxfp4": _method("mxfp4"),
    "aqlm 1x16 g8": vectors(1, 16, 8),
    "aqlm 2x8 g8": vectors(2, 8, 8),
    "higgs 4 bits": vectors(1, 8, 2, 256),
    "higgs 3 bits": vectors(1, 6, 2, 256),
    "higgs 2 bits": vectors(1, 8, 4, 256),
    "vptq v8 k65536": row_vectors(8, 65536),
    "vptq v8 k65536+256": row_vectors(8, 65536, 256),
    "vptq v16 k65536+65536": row_vectors(16, 65536, 65536),
    "vptq v12 k65536": row_vectors(12, 65536),
    "exl3 4 bits": trellis(4, "mcg"),
    "exl3 3 bits": trellis(3, "mcg"),
    "exl3 4 bits mul1": trellis(4, "mul1"),
    "quip# 2 bits": lattice(),
    "quip# 4 bits": lattice(3.45),
    "fp8 channel": _method("fp8:activation=none"),
    "fp8 block": _method("fp8:weights=block,activation=none"),
    "w8a8": _method("w8a8_int8"),
    "fp8 row x row": _method("fp8:weights=channel"),
    "fp8 block x group": _method("fp8:weights=block"),
}
