"""The contract of linear kernels: every kernel, every scheme it does not refuse.

    unpack(pack(w)) == w      linear == x @ dequantize(w).T in float64      rows == dequantize(w)[ids]
    a row of results does not depend on the other rows, nor on the number of threads

Weights are cruel: each group has its own scale, zero and offset, all codes occur, outputs are no multiple of
any tile. Packed weights and outputs end at guard pages, and outputs are NaN before a call. Run again under
every instruction set this CPU has (LOWBIT_ISA) by kernels/test_instruction_sets.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gguf_blocks import NAMES, random_blocks, tensor_of
from guard_page import at_guard_page, rows_at_guard_page
from kernel_inputs import ROUNDS_INPUTS, in_words, seen_by, unrounded
from lowbit.errors import LowbitError
from lowbit.kernels import (
    LinearKernel,
    PackedWeight,
    choose,
    code_tables,
    linear_kernels,
    native,
    packed_linear,
)
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.cpu_columns import ColumnsWeight
from lowbit.kernels.cpu_dense import CpuDense
from lowbit.kernels.cpu_lattice import CpuLattice
from lowbit.kernels.cpu_row_vectors import CpuRowVectors, RowVectorsWeight
from lowbit.kernels.cpu_trellis import CpuTrellis
from lowbit.kernels.cpu_vectors import CpuVectors
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.packed_linear import INPUT_WORDS, NativeWeight, takes
from lowbit.kernels.transformed_kernel import TransformedWeight
from lowbit.layers.linear import Linear
from lowbit.numerics.lattice import LatticeLayout
from lowbit.numerics.number_formats import (
    NumberFormat,
    RowVectorLayout,
    number_format,
    trellis_format,
    vector_format,
)
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme, Scheme, dense
from lowbit.numerics.trellis import BLOCK, MULTIPLIERS, TrellisLayout
from sparse_memory import far_apart, sparse_zeros

pytestmark = pytest.mark.usefixtures("poisoned")
needs_native = pytest.mark.skipif(native.library() is None, reason="the native library was not built")

CPU = torch.device("cpu")
ROWS_OF_X = (1, 2, 3, 7, 17, 64, 65, 130)


def canonical(
    name: str,
    group: int,
    scale: str = "f16",
    zero: bool = False,
    offset: bool = False,
    order: bool = False,
    shape: tuple[int, int] = (37, 256),
    block_rows: int = 1,
) -> QuantizedTensor:
    """A weight with unlike numbers in every group and every code somewhere."""
    generator = torch.Generator().manual_seed(group + len(name))
    fmt, (out, columns) = number_format(name), shape
    count = 1 << int(fmt.bits)
    codes = torch.arange(out * columns).mul(7).remainder(count).view(shape)
    codes = codes[:, torch.randperm(columns, generator=generator)].to(torch.uint8)
    if fmt.dtype is not None and not fmt.table().isfinite().all():
        codes[~fmt.table()[codes.long()].isfinite()] = 3
    rows = -(-out // block_rows) if block_rows else 1
    groups = (rows, -(-columns // (group or columns)))

    def numbers() -> torch.Tensor:
        values = torch.randn(groups, generator=generator) * 0.02
        values.view(-1)[::11] = 0
        if scale == "e8m0":
            return (
                torch.randint(100, 130, groups, generator=generator)
                .to(torch.uint8)
                .view(torch.float8_e8m0fnu)
            )
        return values.to(number_format(scale).dtype)

    zeros = torch.randint(0, count, groups, generator=generator).to(torch.uint8) if zero else None
    scheme = Scheme(
        fmt,
        ((block_rows, group),),
        (number_format(scale),),
        "integer" if zero else "none",
        offset,
        reordered=order,
    )
    permutation = torch.randperm(columns, generator=generator) if order else None
    return QuantizedTensor(
        scheme, shape, codes, (numbers(),), zeros, (numbers(),) if offset else (), permutation, "test"
    )


def ragged(name: str, group: int, columns: int) -> QuantizedTensor:
    """A last group that is short: numbers of a wider weight, its codes cut."""
    wide = -(-columns // group) * group
    weight = canonical(name, group, "f32", zero=name.startswith("u"), shape=(37, wide))
    return replace(weight, shape=(37, columns), codes=weight.codes[:, :columns].contiguous())


def float_zero(name: str, group: int, scale: str) -> QuantizedTensor:
    """Zero points between and beyond the codes, in the scale's type (HQQ)."""
    weight = canonical(name, group, scale, zero=True)
    assert weight.zeros is not None
    spread = torch.linspace(-300, 300, weight.zeros.numel()).view(weight.zeros.shape)
    zeros = (weight.zeros.float() * 1.37 - 2.2 + spread * (weight.zeros == 1)).to(weight.scales[0].dtype)
    return replace(weight, scheme=replace(weight.scheme, zero="float"), zeros=zeros)


def flat(name: str, group: int, scale: str = "f32", zero: bool = False) -> QuantizedTensor:
    """Blocks over row ends, the last one short: 37 rows of 176 columns (bitsandbytes, HQQ)."""
    generator = torch.Generator().manual_seed(group)
    shape = (37, 176)
    weight, count = canonical(name, 0, scale, shape=shape), -(-37 * 176 // group)
    scales = (torch.randn(count, generator=generator) * 0.02).to(number_format(scale).dtype)
    zeros = (torch.rand(count, generator=generator) * 15).to(scales.dtype) if zero else None
    scheme = replace(weight.scheme, blocks=((1, group),), flattened=True, zero="float" if zero else "none")
    return replace(weight, scheme=scheme, scales=(scales,), zeros=zeros)


def strided() -> QuantizedTensor:
    """A scale and a zero point for each weight (HQQ's axis 0)."""
    weight, generator = canonical("uint4", 32, zero=True), torch.Generator().manual_seed(9)
    scale, zero = (torch.randn(2, 37, 256, generator=generator) * 0.1).half().unbind()
    scheme = replace(weight.scheme, blocks=((1, 1),), zero="float")
    return replace(weight, scheme=scheme, scales=(scale,), zeros=zero * 50)


def by_columns(
    name: str,
    height: int,
    scale: str = "f16",
    zero: bool = True,
    shape: tuple[int, int] = (37, 256),
    apart: bool = False,
) -> QuantizedTensor:
    """A scale, and a float zero point, for ``height`` rows of a column (HQQ, axis 0); 0: for all of it."""
    weight = canonical(name, 1, scale, zero=zero, shape=shape, block_rows=height)
    if weight.zeros is not None:
        spread = torch.linspace(-300, 300, weight.zeros.numel()).view(weight.zeros.shape)
        zeros = (weight.zeros.float() * 1.37 - 2.2 + spread * (weight.zeros == 1)).to(weight.scales[0].dtype)
        weight = replace(weight, scheme=replace(weight.scheme, zero="float"), zeros=zeros)
    if not apart:
        return weight
    groups = torch.arange(shape[0]) % len(weight.scales[0])
    return replace(weight, scheme=replace(weight.scheme, scattered=True), row_groups=groups)


def in_tiles(name: str, group: int, height: int, shape: tuple[int, int] = (37, 256)) -> QuantizedTensor:
    """Groups of the row with float zero points under a scale for so many rows of a column (SINQ)."""
    weight = canonical(name, group, zero=True, shape=shape)
    assert weight.zeros is not None
    second = canonical(name, 1, "f32", shape=shape, block_rows=height).scales[0] * 50
    scheme = replace(
        weight.scheme,
        zero="float",
        blocks=((1, group), (height, 1)),
        scales=(weight.scheme.scales[0], number_format("f32")),
    )
    zeros = (weight.zeros.float() * 0.9 + 0.3).half()
    return replace(weight, scheme=scheme, scales=(weight.scales[0], second), zeros=zeros)


def nvfp4(rows: int) -> QuantizedTensor:
    """Two levels: e4m3 for 16 columns under one float32 for the tensor (0), or one for each row (1)."""
    inner = canonical("e2m1", 16, "e4m3")
    outer = torch.tensor([[0.37]]) if rows == 0 else torch.linspace(-2, 3, 37).unsqueeze(1)
    f32 = number_format("f32")
    scheme = replace(inner.scheme, blocks=((1, 16), (rows, 0)), scales=(*inner.scheme.scales, f32))
    return replace(inner, scheme=scheme, scales=(inner.scales[0], outer))


def vectors(
    books: int,
    bits: int,
    length: int,
    scale: str = "f16",
    shape: tuple[int, int] = (37, 256),
    rows: int = 1,
    order: bool = False,
    height: int = 1,
    group: int = 0,
) -> QuantizedTensor:
    """Indices of codebooks' vectors, first and last among them (AQLM); 16 bits hold their numbers exactly.

    ``group``: columns of a row that share a scale (HIGGS), 0: all."""
    generator = torch.Generator().manual_seed(books + bits + length)
    fmt, (out, columns) = vector_format(books, bits, length, height), (shape[0] // height, shape[1])
    assert fmt.vectors is not None
    indices = torch.randint(1 << bits, (out, columns // length, books), generator=generator)
    indices[0], indices[-1] = (1 << bits) - 1, 0
    codes = indices.to(torch.uint8 if bits <= 8 else torch.int16).view(torch.uint8).flatten(1)
    scales = torch.randn(out if rows else 1, columns // group if group else 1, generator=generator) * 0.02
    codebooks = torch.randint(-150, 151, (books, 1 << bits, height * length), generator=generator) / 16
    return QuantizedTensor(
        Scheme(fmt, ((rows * height, group),), (number_format(scale),), reordered=order),
        shape,
        codes,
        (scales.to(number_format(scale).dtype),),
        column_order=torch.randperm(columns, generator=generator) if order else None,
        origin="test",
        codebooks=codebooks.to(number_format(scale).dtype),
    )


def row_vectors(
    length: int,
    centroids: int,
    residual: int = 0,
    dtype: str = "f16",
    shape: tuple[int, int] = (37, 256),
    books: int = 1,
    outliers: int = 0,
    scale: str = "",
    order: bool = False,
) -> QuantizedTensor:
    """Indices of codebooks' vectors of rows (VPTQ), first and last among them; 16 bits hold their numbers
    exactly. ``scale``: the type of the columns' scales and offsets, "" where there are none."""
    generator = torch.Generator().manual_seed(length + centroids + residual)
    out, columns = shape
    width = (columns - outliers) // books
    parted = width if books > 1 or outliers else 0
    layout = RowVectorLayout(length, centroids, residual, dtype, books, parted, outliers)
    fmt = number_format(layout.name)
    assert fmt.vectors == layout
    vectors, float_type = -(-out // length), number_format(dtype).dtype
    cells = []
    for count, size in zip((centroids, residual), layout.index_bytes, strict=True):
        if size:
            index = torch.randint(count, (vectors, books * width, 1), generator=generator)
            index[:, 0], index[:, -1] = count - 1, 0
            cells += [(index >> 8 * byte & 0xFF).to(torch.uint8) for byte in range(size)]
    numbers = torch.randint(-900, 901, (vectors, outliers * length), generator=generator) / 16
    codes = torch.cat((numbers.to(float_type).view(torch.uint8), torch.cat(cells, -1).flatten(1)), 1)
    codebooks = torch.randint(-150, 151, (books, centroids + residual, length), generator=generator) / 16
    scales, offsets = torch.randn(2, 1, columns, generator=generator).mul(0.02).unbind()
    levels = (number_format(scale),) if scale else ()
    scale_type = levels[0].dtype if levels else None
    return QuantizedTensor(
        Scheme(fmt, ((0, 1),) if scale else (), levels, offset=bool(scale), reordered=order),
        shape,
        codes,
        (scales.to(scale_type),) if scale else (),
        offsets=(offsets.to(scale_type),) if scale else (),
        column_order=torch.randperm(columns, generator=generator) if order else None,
        origin="test",
        codebooks=codebooks.to(float_type),
    )


def trellis(bits: int, book: str, shape: tuple[int, int] = (128, 256), skip: int = 0) -> QuantizedTensor:
    """Random bits (EXL3); of the first tile all ones, which every window of is the same. Of a shape that is
    not whole blocks codes and scales are, and where some rows of the first are another's."""
    generator = torch.Generator().manual_seed(bits + len(book))
    fmt, half = number_format(TrellisLayout(bits, book, skip).name), number_format("f16")
    assert fmt.trellis is not None
    out, columns = fmt.trellis.whole(shape)
    codes = torch.randint(256, (out, fmt.trellis.row_bytes(columns)), generator=generator)
    codes[:16, : 2 * bits] = 255
    outputs = (torch.randn(out, 1, generator=generator) * 0.3).half()
    inputs = (torch.randn(1, columns, generator=generator) * 0.2).half()
    scheme = Scheme(fmt, ((1, 0), (0, 1)), (half, half))
    return QuantizedTensor(scheme, shape, codes.to(torch.uint8), (outputs, inputs), origin="test")


def lattice(divisor: float = 0.0, shape: tuple[int, int] = (64, 128), second: int = 16) -> QuantizedTensor:
    """Random codes (QuIP#), the first and the last among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    layout, single, (out, columns) = LatticeLayout(divisor, second), number_format("f32"), shape
    sizes = (1 << 16, 1 << second)[: layout.books]
    books = [torch.randint(size, (out, columns // 8), generator=generator) for size in sizes]
    books[-1][0, 0], books[-1][0, 1] = 0, sizes[-1] - 1
    outputs = torch.randn(out, 1, generator=generator) * 0.3 / (out * columns) ** 0.5
    inputs = torch.randn(1, columns, generator=generator) * 0.2
    scheme = Scheme(number_format(layout.name), ((1, 0), (0, 1)), (single, single))
    return QuantizedTensor(scheme, shape, layout.codes(books), (outputs, inputs), origin="test")


def rank_of_lattice(weight: QuantizedTensor) -> QuantizedTensor:
    """What one of two ranks has: the codes of half of the rows, under the scales of columns alone."""
    scheme = replace(weight.scheme, blocks=((0, 1),), scales=weight.scheme.scales[1:])
    half = replace(weight, scheme=scheme, scales=weight.scales[1:])
    return half.rows(weight.shape[0] // 2, weight.shape[0])


def rounded_of_lattice(
    weight: QuantizedTensor, packed: TransformedWeight, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x is rounded between the transforms, of which the native ones are tested by themselves."""
    layout = weight.scheme.weight.lattice
    assert layout is not None and takes(packed.tiles.description, INPUT_WORDS)
    turned, numbers = packed.before.rotated(x, torch.float32), layout.vectors(weight.codes).double()
    seen = in_words(turned, 32767)
    if packed.after is None:
        return seen @ numbers.T, seen.abs() @ numbers.abs().T
    back = packed.after.rotation(torch.eye(weight.shape[0])).double()
    largest = (seen.abs() @ numbers.abs().T).norm(dim=1, keepdim=True)
    return seen @ numbers.T @ back, largest * weight.scales[0].flatten().double().abs()


def trellis_numbers(weight: QuantizedTensor) -> torch.Tensor:
    """float64 (out, in): what the kernel multiplies between the transforms, from the windows themselves."""
    layout = weight.scheme.weight.trellis
    assert layout is not None
    words = layout.tiles(weight.codes).int() & 0xFFFF  # (in / 16, out / 16, words)
    words = words.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    stream = (words.unsqueeze(-1) >> torch.arange(15, -1, -1) & 1).flatten(-2)
    whole = torch.empty(*words.shape[:2], 16, 16, dtype=torch.float64)  # of a tile (out, in)
    for number in range(256):
        lane, at = divmod(number, 8)
        row, column = lane // 4 + 8 * (at > 3), lane % 4 * 2 + at % 2 + 8 * (at % 4 > 1)
        end = (number + 1) * layout.bits
        window = stream[..., torch.arange(end - 16, end) % stream.shape[-1]]
        code = (window.long() << torch.arange(15, -1, -1)).sum(-1)
        whole[..., row, column] = whole_number(layout.book, code)
    return whole.permute(1, 2, 0, 3).reshape(layout.whole(weight.shape))


def whole_number(book: str, code: torch.Tensor) -> torch.Tensor:
    """float64: a code book's number for 16 bits as the kernel has it."""
    product = code * MULTIPLIERS[book] + (64248484 if book == "3inst" else 0)
    if book == "mul1":
        total = (product.unsqueeze(-1) >> torch.tensor([0, 8, 16, 24]) & 255).sum(-1)
        return (15 * total - 7654).double() * (0.00676727294921875 / 15)
    bits = (product.unsqueeze(-1) >> torch.tensor([0, 16]) & 0x8FFF) ^ 0x3B60
    halves = bits.to(torch.uint16).view(torch.float16).double()
    return (halves.sum(-1) * 2**11 + 0.5).floor() / 2**11


def with_outliers(
    shape: tuple[int, int] = (37, 256), share: float = 0.02, order: bool = False
) -> QuantizedTensor:
    """Codes of which float16 arithmetic makes weights, some subnormal, and outliers, the first and the last
    weight's among them (SpQR)."""
    generator = torch.Generator().manual_seed(8)
    weight = canonical("uint3", 16, zero=True, order=order, shape=shape)
    assert weight.zeros is not None
    zeros = (weight.zeros.float() * 1.1717 - 0.37).half()
    scales = weight.scales[0] * torch.where(weight.zeros % 3 == 0, 2.0**-10, 1.0).half()
    chosen = torch.rand(shape, generator=generator) < share
    chosen.view(-1)[:: max(1, chosen.numel() - 1)] = share > 0
    rows, columns = chosen.nonzero().unbind(1)
    values = (torch.randn(len(rows), generator=generator) * 0.3).half()
    half = number_format("f16")
    return replace(
        weight,
        scheme=replace(
            weight.scheme, zero="float", outliers=half, outlier_share=len(rows) / (shape[0] * shape[1])
        ),
        scales=(scales,),
        zeros=zeros,
        outliers=Outliers.of(rows, columns, values, shape[0]),
    )


def odd(weight: QuantizedTensor) -> QuantizedTensor:
    """The same codes of a table of bfloat16 numbers that no factor makes whole ones of a few bits."""
    bits = int(weight.scheme.weight.bits)
    values = tuple((2 * code - (1 << bits) + 1) * (1.0 + code % 3) / 64 for code in range(1 << bits))
    return replace(weight, scheme=replace(weight.scheme, weight=NumberFormat(f"odd{bits}", bits, values)))


def crooked() -> QuantizedTensor:
    """7-bit codes that are no line: the native code has no table for them."""
    weight = canonical("uint7", 64)
    fmt = NumberFormat("crooked7", 7, tuple(float(code ^ 64) for code in range(128)))
    return replace(weight, scheme=replace(weight.scheme, weight=fmt))


def dense_weight(name: str, shape: tuple[int, int]) -> QuantizedTensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return QuantizedTensor(dense(name), shape, values.to(number_format(name).dtype), origin="test")


WEIGHTS = {
    **{f"gguf {name}": (lambda name=name: tensor_of(name, random_blocks(name, 37, 2))) for name in NAMES},
    "int4 g32": lambda: canonical("int4", 32),
    "uint4 g128 zero (AWQ, GPTQ)": lambda: canonical("uint4", 128, zero=True),
    "uint4 g64 bf16 offset": lambda: canonical("uint4", 64, "bf16", offset=True),
    "uint4 g32 f32 zero act-order": lambda: canonical("uint4", 128, "f32", zero=True, order=True),
    "int8 channel f32": lambda: canonical("int8", 0, "f32"),
    "uint8 g32 zero": lambda: canonical("uint8", 32, zero=True),
    "uint4 g64 float zero (HQQ)": lambda: float_zero("uint4", 64, "f16"),
    "uint3 g32 bf16 float zero": lambda: float_zero("uint3", 32, "bf16"),
    "3 bits of an odd table g64 offset": lambda: odd(canonical("uint3", 64, offset=True)),
    "5 bits of an odd table g16 zero": lambda: odd(canonical("uint5", 16, zero=True)),
    "6 bits of an odd table": lambda: odd(canonical("uint6", 0, "f32")),
    "2 bits of an odd table g8": lambda: odd(canonical("uint2", 8)),
    "nf4 flat g64": lambda: flat("nf4", 64),
    "fp4 flat g64": lambda: flat("fp4_bnb", 64),
    "uint4 flat g96 bf16 float zero": lambda: flat("uint4", 96, "bf16", zero=True),
    "uint8 flat g24 f16": lambda: flat("uint8", 24, "f16"),
    "int4 g128, 136 columns": lambda: ragged("int4", 128, 136),
    "int8 g128, 52 columns": lambda: ragged("int8", 128, 52),
    "e4m3 128x128, 136 columns": lambda: canonical("e4m3", 128, "f32", shape=(37, 136), block_rows=16),
    "uint1 g8 float zero": lambda: float_zero("uint1", 8, "f16"),
    "int5 g8": lambda: canonical("int5", 8),
    "uint6 g8 f32 zero": lambda: canonical("uint6", 8, "f32", zero=True),
    "uint4 1x1 float zero": strided,
    "uint4 whole columns, float zero (HQQ)": lambda: by_columns("uint4", 0),
    "uint3 16x1 bf16 float zero": lambda: by_columns("uint3", 16, "bf16"),
    "uint8 13x1 apart, float zero (HQQ)": lambda: by_columns("uint8", 13, apart=True),
    "uint1 7x1 apart f32 float zero": lambda: by_columns("uint1", 7, "f32", apart=True),
    "int5 32x1 bf16": lambda: by_columns("int5", 32, "bf16", zero=False),
    "uint6 8x1 apart, 83 columns": lambda: by_columns("uint6", 8, shape=(37, 83), apart=True),
    "nf4 16x1 f32 zero": lambda: canonical("nf4", 1, "f32", zero=True, block_rows=16),
    "e4m3 20x1": lambda: by_columns("e4m3", 20, zero=False),
    "uint4 g32, tiles of 16 (SINQ)": lambda: in_tiles("uint4", 32, 16),
    "uint3 g8, tiles of 8, 72 columns": lambda: in_tiles("uint3", 8, 8, shape=(37, 72)),
    "uint2 g64, tiles of 64 (SINQ)": lambda: in_tiles("uint2", 64, 64, shape=(192, 320)),
    "uint2 g32 zero": lambda: canonical("uint2", 64, zero=True),
    "uint3 g128 zero": lambda: canonical("uint3", 128, zero=True),
    "int5 g64": lambda: canonical("int5", 64),
    "int6 g16": lambda: canonical("int6", 16),
    "int7 g64": lambda: canonical("int7", 64),
    "int7 g16 f32 offset": lambda: canonical("int7", 16, "f32", offset=True),
    "uint7 g128 zero": lambda: canonical("uint7", 128, zero=True),
    "uint7 g32 bf16 float zero (HQQ)": lambda: float_zero("uint7", 32, "bf16"),
    "e2m1 g32 e8m0 (MXFP4)": lambda: canonical("e2m1", 32, "e8m0"),
    "e2m3 g32 e8m0": lambda: canonical("e2m3", 32, "e8m0"),
    "e3m2 g32 e8m0 (MXFP6)": lambda: canonical("e3m2", 32, "e8m0"),
    "e3m2 g16 bf16, 72 columns": lambda: canonical("e3m2", 16, "bf16", shape=(37, 72)),
    "int8 tensor": lambda: canonical("int8", 0, "f32", block_rows=0),
    "int4 16x64 blocks": lambda: canonical("int4", 64, "f32", block_rows=16, shape=(48, 256)),
    "e4m3 blocks": lambda: canonical("e4m3", 128, "f32", block_rows=16, shape=(48, 256)),
    "e4m3 channel f32": lambda: canonical("e4m3", 0, "f32"),
    "e4m3 blocks, ragged": lambda: ragged("e4m3", 128, 320),
    "uint8 g128 zero, last group short": lambda: ragged("uint8", 128, 192),
    "e4m3 tensor act-order": lambda: canonical("e4m3", 0, "f32", block_rows=0, order=True),
    "e4m3 g32 e8m0 (MXFP8)": lambda: canonical("e4m3", 32, "e8m0"),
    "nf4 g64": lambda: canonical("nf4", 64, "f32"),
    "fp4 g128 bf16": lambda: canonical("fp4_bnb", 128, "bf16"),
    "nf4 g16 e4m3": lambda: canonical("nf4", 16, "e4m3"),
    "nf4 g64 float zero (SINQ)": lambda: float_zero("nf4", 64, "f16"),
    "nf4 g16 bf16 float zero": lambda: float_zero("nf4", 16, "bf16"),
    "nf4 g32 f32 offset": lambda: canonical("nf4", 32, "f32", offset=True),
    "fp4 g64 float zero": lambda: float_zero("fp4_bnb", 64, "f16"),
    "fp4 g16 f32 offset": lambda: canonical("fp4_bnb", 16, "f32", offset=True),
    "uint1 g64 zero": lambda: canonical("uint1", 64, zero=True),
    "int1 g16": lambda: canonical("int1", 16),
    "e5m2 g64": lambda: canonical("e5m2", 64),
    "e4m3fnuz blocks": lambda: canonical("e4m3fnuz", 128, "f32", block_rows=16, shape=(48, 256)),
    "e5m2fnuz channel": lambda: canonical("e5m2fnuz", 0, "f32"),
    "int4 g8": lambda: canonical("int4", 8),
    "uint2 g8 zero": lambda: canonical("uint2", 8, zero=True),
    "uint3 g8 float zero (HQQ)": lambda: float_zero("uint3", 8, "f16"),
    "uint8 g8 bf16 offset, 72 columns": lambda: canonical("uint8", 8, "bf16", offset=True, shape=(37, 72)),
    "e4m3 48x40 blocks": lambda: canonical("e4m3", 40, "f32", shape=(96, 320), block_rows=48),
    "e4m3 48x40 blocks, last ones short": lambda: canonical(
        "e4m3", 40, "f32", shape=(37, 212), block_rows=48
    ),
    "int8 16x24 blocks": lambda: canonical("int8", 24, "f32", shape=(37, 264), block_rows=16),
    "e5m2 g8": lambda: canonical("e5m2", 8),
    "e4m3fnuz g8 bf16": lambda: canonical("e4m3fnuz", 8, "bf16", shape=(37, 72)),
    "e5m2fnuz 5x56 blocks": lambda: canonical("e5m2fnuz", 56, "f32", shape=(37, 280), block_rows=5),
    "int4 g48": lambda: canonical("int4", 48, shape=(37, 288)),
    "int4 channel, 83 columns": lambda: canonical("int4", 0, "f32", shape=(37, 83)),
    "uint4 g32 zero, 72 columns": lambda: canonical("uint4", 32, zero=True, shape=(37, 72)),
    "int6 g16, 1000 columns": lambda: canonical("int6", 16, shape=(37, 1000)),
    "uint8 channel zero, 65 columns": lambda: canonical("uint8", 0, "f32", zero=True, shape=(37, 65)),
    "e2m1 g16 e4m3 (NVFP4)": lambda: nvfp4(0),
    "e2m1 g16 e4m3, rows unlike (fused NVFP4)": lambda: nvfp4(1),
    "uint4 g96 zero, many blocks": lambda: canonical("uint4", 96, zero=True, shape=(700, 864)),
    "int4 g32, many blocks": lambda: canonical("int4", 32, shape=(700, 288)),
    "int8 channel, long rows": lambda: canonical("int8", 0, "f32", shape=(70, 1056)),
    "codebooks 1x16 of 8 (AQLM)": lambda: vectors(1, 16, 8),
    "codebooks 2x8 of 8 (AQLM)": lambda: vectors(2, 8, 8),
    "codebooks 3x8 of 8 bf16, 72 columns": lambda: vectors(3, 8, 8, "bf16", (37, 72)),
    "codebooks 1x12 of 16 f32, 80 columns": lambda: vectors(1, 12, 16, "f32", (37, 80)),
    "codebooks 2x16 of 16": lambda: vectors(2, 16, 16, shape=(37, 96)),
    "codebooks 1x5 of 8, one scale": lambda: vectors(1, 5, 8, rows=0),
    "codebooks 4x8 of 32": lambda: vectors(4, 8, 32),
    "codebooks 2x8 of 3 rows of 8": lambda: vectors(2, 8, 8, shape=(36, 104), height=3),
    "codebooks 1x1 of 8 act-order": lambda: vectors(1, 1, 8, order=True),
    "codebooks 1x12 of 32, many blocks": lambda: vectors(1, 12, 32, shape=(700, 288)),
    "codebooks 2x8 of 16, many blocks": lambda: vectors(2, 8, 16, shape=(700, 288)),
    "codebooks 2x8 of 8 f32, many blocks": lambda: vectors(2, 8, 8, "f32", (410, 264)),
    "codebooks 1x8 of 2 g64 (HIGGS)": lambda: vectors(1, 8, 2, group=64),
    "codebooks 1x6 of 2 g128 bf16": lambda: vectors(1, 6, 2, "bf16", group=128),
    "codebooks 1x8 of 4 g32 f32": lambda: vectors(1, 8, 4, "f32", (53, 160), group=32),
    "codebooks 1x7 of 2, 86 columns": lambda: vectors(1, 7, 2, shape=(37, 86)),
    "codebooks 1x3 of 4, one scale": lambda: vectors(1, 3, 4, rows=0),
    "codebooks 1x8 of 2 g96 act-order": lambda: vectors(1, 8, 2, shape=(37, 288), group=96, order=True),
    "codebooks 1x8 of 2 g64, many blocks": lambda: vectors(1, 8, 2, shape=(700, 320), group=64),
    "codebooks 1x8 of 4, many blocks": lambda: vectors(1, 8, 4, shape=(700, 288)),
    "codebooks 2x8 of 8 g64, many blocks": lambda: vectors(2, 8, 8, shape=(700, 320), group=64),
    "codebooks 1x16 of 16 g32": lambda: vectors(1, 16, 16, shape=(37, 96), group=32),
    "codebooks of 8 rows (VPTQ)": lambda: row_vectors(8, 65536, 256, "bf16", scale="bf16", order=True),
    "codebooks of 8 rows, 83 columns": lambda: row_vectors(8, 256, shape=(37, 83), scale="f16"),
    "codebooks of 8 rows, both of two bytes": lambda: row_vectors(8, 4096, 257),
    "codebooks of 8 rows, outliers": lambda: row_vectors(
        8, 100, 16, "bf16", (70, 166), 2, 6, scale="f32", order=True
    ),
    "codebooks of 4 rows": lambda: row_vectors(4, 4096),
    "codebooks of 4 rows, three and outliers": lambda: row_vectors(
        4, 128, 64, "f32", (37, 140), 3, 35, "f16"
    ),
    "codebooks of 16 rows": lambda: row_vectors(16, 65536, 1000, shape=(37, 96), scale="f16"),
    "codebooks of 12 rows": lambda: row_vectors(12, 1024, 4, shape=(37, 96), scale="bf16", order=True),
    "codebooks of 6 rows, outliers": lambda: row_vectors(6, 64, shape=(64, 76), books=2, outliers=12),
    "codebooks of 3 rows": lambda: row_vectors(3, 2, 2, shape=(37, 33)),
    "codebooks of 9 rows, many blocks": lambda: row_vectors(9, 500, 200, shape=(700, 288), scale="f16"),
    "trellis 1 mcg (EXL3)": lambda: trellis(1, "mcg"),
    "trellis 2 mul1": lambda: trellis(2, "mul1"),
    "trellis 3 3inst": lambda: trellis(3, "3inst"),
    "trellis 4 mcg": lambda: trellis(4, "mcg", (256, 128)),
    "trellis 5 mul1": lambda: trellis(5, "mul1"),
    "trellis 6 3inst": lambda: trellis(6, "3inst", (128, 128)),
    "trellis 7 mcg": lambda: trellis(7, "mcg"),
    "trellis 8 mul1": lambda: trellis(8, "mul1"),
    "trellis 5 mcg, no whole blocks": lambda: trellis(5, "mcg", (200, 300)),
    "trellis 2 mul1, fewer than a block": lambda: trellis(2, "mul1", (20, 31)),
    "trellis 3 3inst, a rank's rows": lambda: trellis(3, "3inst", (100, 128), skip=60),
    "lattice (QuIP#)": lattice,
    "lattice, heads of 12 and 20": lambda: lattice(shape=(80, 192)),
    "lattice, many blocks": lambda: lattice(shape=(640, 448)),
    "lattice, a rank's rows": lambda: rank_of_lattice(lattice(shape=(192, 256))),
    "lattice, two codes, a rank's rows": lambda: rank_of_lattice(lattice(3.45, (96, 448))),
    "lattice, two codes": lambda: lattice(3.45, (48, 64)),
    "lattice, two codes, many blocks": lambda: lattice(2.0, (224, 512)),
    "lattice, two codes, no small fraction": lambda: lattice(3.14159, (48, 64)),
    "trellis 4 mcg, many blocks": lambda: trellis(4, "mcg", (640, 384)),
    "uint3 g16 outliers (SpQR)": with_outliers,
    "uint3 g16 outliers act-order": lambda: with_outliers((50, 336), 0.1, order=True),
    "uint3 g16, outliers nowhere": lambda: with_outliers(share=0.0),
    "uint3 g16, outliers everywhere": lambda: with_outliers((37, 80), 1.0),
    "uint3 g16 outliers, many blocks": lambda: with_outliers((700, 288)),
    "dense bf16": lambda: dense_weight("bf16", (37, 83)),
    "dense bf16, many blocks": lambda: dense_weight("bf16", (700, 600)),
    "dense f16": lambda: dense_weight("f16", (19, 96)),
    "dense f32": lambda: dense_weight("f32", (50, 33)),
}
KINDS = {name: (weight.scheme, weight.shape) for name, make in WEIGHTS.items() for weight in [make()]}
PAIRS = [
    pytest.param(kernel, name, id=f"{kernel.name}-{name}")
    for kernel in linear_kernels()
    if kernel.name != "cpu_dequantized"  # its numbers are others: tests/kernels/test_cpu_dequantized.py
    for name, (scheme, shape) in KINDS.items()
    if kernel.refuses(scheme, shape, CPU) is None
]
NATIVE_PAIRS = [pair for pair in PAIRS if "reference" not in str(pair.id)]


def normal_form(weight: QuantizedTensor) -> torch.Tensor:
    """What two equal weights agree on."""
    return weight.dequantize().nan_to_num()


WHOLE_TABLES = ("nf4",)  # multiplied as whole numbers, and x too


def multiplied(weight: QuantizedTensor) -> torch.Tensor:
    """float64: the weight with the values that a kernel multiplies."""
    fmt = weight.scheme.weight
    if fmt.name not in WHOLE_TABLES:
        return normal_form(weight).double()
    whole, factor = code_tables.whole_table(fmt)
    values = NumberFormat("whole numbers", 4, tuple((whole * factor).tolist()))
    return normal_form(replace(weight, scheme=replace(weight.scheme, weight=values))).double()


def rounded_of_row_vectors(weight: QuantizedTensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x takes over the columns' scales, and is rounded in the tiles of outliers and of each book."""
    layout, columns = weight.scheme.weight.vectors, weight.shape[1]
    assert isinstance(layout, RowVectorLayout)
    bare = replace(
        weight, scheme=Scheme(weight.scheme.weight), scales=(), offsets=(), column_order=None
    ).dequantize()
    taken = x if weight.column_order is None else x[:, weight.column_order]
    scaled = taken * weight.scales[0].float() if weight.scales else taken
    widths = [layout.outliers, *[layout.width or columns] * layout.books]
    seen = torch.cat([in_words(part) for part in scaled.split(widths, 1) if part.shape[1]], 1)
    expected, scale = seen @ bare.double().T, seen.abs() @ bare.abs().double().T
    if weight.offsets:
        expected += (taken.double() * weight.offsets[0].double()).sum(1, keepdim=True)
        scale += (taken.abs().double() * weight.offsets[0].abs().double()).sum(1, keepdim=True)
    return expected, scale


def rounded(weight: QuantizedTensor, packed: PackedWeight, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """float64: the product of what the kernel multiplies, and what its error is measured by."""
    if isinstance(packed, RowVectorsWeight):
        return rounded_of_row_vectors(weight, x)
    if isinstance(packed, TransformedWeight) and weight.scheme.weight.lattice is not None:
        return rounded_of_lattice(weight, packed, x)
    if isinstance(packed, TransformedWeight):
        outputs, inputs = (scale.flatten() for scale in weight.scales)
        numbers, layout = trellis_numbers(weight), weight.scheme.weight.trellis
        assert layout is not None
        turn, own = Rotation.hadamard(BLOCK), slice(layout.skip, layout.skip + weight.shape[0])
        x = torch.nn.functional.pad(x, (0, numbers.shape[1] - x.shape[1]))
        seen = in_words(turn(x * inputs.float()), 8191)
        whole = (seen @ numbers.T).unflatten(1, (-1, BLOCK)) @ turn(torch.eye(BLOCK)).double()
        largest = (seen.abs() @ numbers.abs().T).unflatten(1, (-1, BLOCK)).norm(dim=-1, keepdim=True)
        scale = largest.expand(whole.shape).flatten(1) * outputs.double().abs()
        return (whole.flatten(1) * outputs.double())[:, own], scale[:, own]
    if weight.outliers is not None and packed.kernel.name == "cpu_blocks":
        (codes, outliers), seen = unrounded(weight), seen_by(packed, x)
        expected = seen @ codes.T + x.double() @ outliers.T
        return expected, seen.abs() @ codes.abs().T + x.abs().double() @ outliers.abs().T
    if not isinstance(packed, ColumnsWeight):
        exact = normal_form(weight).double() if packed.kernel.name == "reference" else multiplied(weight)
        seen = seen_by(packed, x)
        return seen @ exact.T, seen.abs() @ exact.abs().T
    # Every group of rows meets an x of its own.
    height, (out, _) = weight.scheme.blocks[-1][0], weight.shape
    groups = weight.row_groups if weight.row_groups is not None else torch.arange(out) // (height or out)
    bare = replace(weight, scales=(*weight.scales[:-1], torch.ones_like(weight.scales[-1].float())))
    zeros = torch.zeros(weight.shape)
    if len(weight.scales) == 1 and weight.zeros is not None:
        zeros, bare = weight._spread(weight.zeros, 0), replace(bare, zeros=None)
    codes, zeros = multiplied(bare), zeros.double()
    words = takes(packed.codes.description, INPUT_WORDS)
    expected, scale = torch.zeros(len(x), out).double(), torch.zeros(len(x), out).double()
    for group in groups.unique():
        rows = groups == group
        scaled = x * weight.scales[-1][group].float()
        largest = 16383 if weight.scheme.weight.name == "nf4" else 32767
        seen = in_words(scaled, largest) if words else scaled.bfloat16().double()
        beside = scaled.double() if words else seen
        expected[:, rows] = seen @ codes[rows].T - beside @ zeros[rows].T
        scale[:, rows] = seen.abs() @ (codes[rows] - zeros[rows]).abs().T
    return expected, scale


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_unpack_gives_the_weight_back(kernel: LinearKernel, name: str) -> None:
    weight = WEIGHTS[name]()
    packed = kernel.pack(weight, CPU)
    again = kernel.unpack(packed)
    expected = weight.expand() if again.scheme.weight.block is None else weight
    if not again.scheme.is_dense or expected.scheme.is_dense:
        assert torch.equal(again.codes, expected.codes)
    assert torch.equal(normal_form(again), normal_form(weight))
    rows, columns = weight.shape
    tiles = (-(-rows // 16) * 16 / rows) * (-(-columns // 32) * 32 / columns)
    order = 8 * columns if weight.column_order is not None else 0
    order += 8 * rows if weight.row_groups is not None else 0
    order += 12 * columns if isinstance(packed, RowVectorsWeight) else 0  # of an order and numbers
    # Which weights share, or the codebooks.
    table = sum(packed.buffers[key].nbytes for key in ("table", "codebooks") if key in packed.buffers)
    growth = {"cpu_blocks": 1.5, "cpu_columns": 2.0, "cpu_row_vectors": 2.1}.get(kernel.name, 1.1)
    assert packed.nbytes - table <= growth * weight.nbytes * tiles + order + 1024
    assert 0 <= packed.nbytes - table - kernel.nbytes(weight.scheme, weight.shape) <= order + 4 * rows


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_restored_buffers_are_the_same_weight(kernel: LinearKernel, name: str) -> None:
    """As the packed cache keeps them: the bytes of each, and nothing else of the weight."""
    weight = WEIGHTS[name]()
    packed = kernel.pack(weight, CPU)
    x = torch.randn(3, weight.shape[1])
    ids = torch.tensor([5, 0], dtype=torch.int32)
    wanted = kernel.linear(x, packed), kernel.rows(packed, ids)
    buffers = {key: buffer.clone() for key, buffer in packed.buffers.items()}
    for key, buffer in packed.buffers.items():
        if key != "table":  # which weights of one format share
            buffer.zero_()  # nothing points into the old ones
    restored = kernel.restore(packed.scheme, packed.shape, buffers, packed.origin)
    assert (restored.kernel, restored.origin, restored.nbytes) == (kernel, packed.origin, packed.nbytes)
    found = kernel.linear(x, restored), kernel.rows(restored, ids)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    if kernel.name != "reference":
        for short in ("data", "table"):
            with pytest.raises(ValueError, match=f"^{packed.origin}: "):
                damaged = {**buffers, short: buffers[short][:-1]}
                kernel.restore(packed.scheme, packed.shape, damaged, packed.origin)
        if "column_order" in buffers:
            outside = {**buffers, "column_order": buffers["column_order"] + 1}
            with pytest.raises(ValueError, match="no order of"):
                kernel.restore(packed.scheme, packed.shape, outside, packed.origin)


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_linear_is_the_product(kernel: LinearKernel, name: str) -> None:
    weight = WEIGHTS[name]()
    if multiplied(weight).abs().max() > 1e6:
        pytest.skip("random bytes of this type decode to numbers no model has")
    packed = kernel.pack(weight, CPU)
    inputs = [
        torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens))
        for tokens in ROWS_OF_X
    ]
    wanted = rounded(weight, packed, torch.cat(inputs))  # row by row, so all at once: it is most of the time
    for x, expected, scale in zip(inputs, *(part.split(ROWS_OF_X) for part in wanted), strict=True):
        out = torch.full((len(x), weight.shape[0]), float("nan"))
        found = kernel.linear(x, packed, out)
        assert found.data_ptr() == out.data_ptr() and not found.isnan().any(), "poison was left"
        assert ((found.double() - expected).abs() / scale.clamp(min=1e-30)).max() < 3e-6


def packed_for_words(name: str) -> tuple[QuantizedTensor, PackedWeight]:
    """A weight that meets x as whole numbers of 15 or 16 bits, under this instruction set."""
    weight = WEIGHTS[name]()
    packed = CpuBlocks().pack(weight, CPU)
    assert isinstance(packed, NativeWeight)
    if not takes(packed.description, INPUT_WORDS):
        assert not name.startswith("nf4"), "everywhere"
        have_words = ("avx2", "avx512_vnni") if name.startswith("e3m2") else ("avx2", "avx512_vnni", "neon")
        assert native.base_isa() not in have_words
        pytest.skip("multiplied in bfloat16 here")
    return weight, packed


WORDS = ["nf4 g64", "nf4 g16 e4m3", "nf4 g64 float zero (SINQ)", "nf4 g32 f32 offset"]
WORDS += ["int4 g32", "uint4 g64 bf16 offset", "uint8 g32 zero", "int8 channel f32"]
WORDS += ["int4 g8", "int6 g16", "int7 g64", "uint3 g128 zero", "e2m1 g32 e8m0 (MXFP4)", "e2m3 g32 e8m0"]
WORDS += ["e3m2 g16 bf16, 72 columns"]
WORDS += ["gguf q4_k", "gguf iq4_nl", "gguf iq2_xs", "gguf iq3_s", "gguf iq1_s", "fp4 g128 bf16"]


def losses(weight: QuantizedTensor, packed: PackedWeight, spike: float = 1.0) -> tuple[float, float]:
    """Beside the float64 product of what is stored: the rounding of the weight and of x together, and what
    x in bfloat16 would cost alone. ``spike``: some of x's columns are so many times larger."""
    exact = weight.dequantize().nan_to_num().double()
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(3))
    x[:, ::32] *= spike
    wanted = x.double() @ exact.T
    products = packed.kernel.linear(x, packed).double(), x.bfloat16().double() @ exact.T
    found, rounded = (float((product - wanted).norm() / wanted.norm()) for product in products)
    return found, rounded


def of_normal_numbers(weight: QuantizedTensor) -> QuantizedTensor:
    """The same indices of other codebooks."""
    assert weight.codebooks is not None
    numbers = torch.randn(weight.codebooks.shape, generator=torch.Generator().manual_seed(6))
    return replace(weight, codebooks=numbers.half())


@needs_native
@pytest.mark.parametrize("spike", [1.0, 300.0])
@pytest.mark.parametrize("name", WORDS)
def test_whole_numbers_lose_less_than_bfloat_inputs(name: str, spike: float) -> None:
    found, rounded = losses(*packed_for_words(name), spike)
    assert found < rounded / 8, (found, rounded)
    assert found < 2e-4


@needs_native
@pytest.mark.parametrize(
    ("books", "bits", "length"), [(1, 16, 8), (2, 8, 8), (1, 12, 8), (1, 8, 2), (1, 8, 4), (1, 6, 2)]
)
@pytest.mark.parametrize("spike", [1.0, 300.0])
def test_codebooks_of_any_numbers_lose_less_than_bfloat_inputs(
    books: int, bits: int, length: int, spike: float
) -> None:
    weight = of_normal_numbers(vectors(books, bits, length))
    packed = CpuVectors().pack(weight, CPU)
    found, rounded = losses(weight, packed, spike)
    single = books == 1 and length == 8
    assert found < rounded / (8 if single else 6), (found, rounded)
    rows, exact = packed.kernel.rows(packed, torch.arange(37)), weight.dequantize().double()
    half = float(packed.buffers["factor"]) / 2 * books * weight.scales[0].double().abs()
    assert ((rows - exact).abs() <= 1.001 * half).all()
    limit = 3e-4 * books if length == 8 else 4e-4
    assert (half / exact.norm(dim=1, keepdim=True) * 256**0.5 < limit).all(), "of a weight"


@needs_native
@pytest.mark.parametrize(("length", "centroids", "residual"), [(8, 65536, 0), (8, 4096, 256), (12, 256, 0)])
@pytest.mark.parametrize("spike", [1.0, 300.0])
def test_vectors_of_rows_of_any_numbers_lose_less_than_bfloat_inputs(
    length: int, centroids: int, residual: int, spike: float
) -> None:
    weight = of_normal_numbers(
        row_vectors(length, centroids, residual, shape=(96, 262), outliers=6, scale="f16", order=True)
    )
    packed = CpuRowVectors().pack(weight, CPU)
    found, rounded = losses(weight, packed, spike)
    assert found < rounded / 4, (found, rounded)
    rows, exact = packed.kernel.rows(packed, torch.arange(96)), weight.dequantize().double()
    factors, order = packed.buffers["factors"].double(), weight.column_order
    terms = 2 if residual else 1
    half = torch.cat((factors[:1].expand(6), factors[1:].expand(256) * terms)) / 2
    half = torch.empty_like(half).index_copy_(0, order, half * weight.scales[0][0].abs().double())
    assert ((rows - exact).abs() <= 1.001 * half + 1e-7).all()
    assert factors[1] < 7e-4 * terms, "of numbers of deviation 1"


@needs_native
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("book", MULTIPLIERS)
def test_trellises_lose_less_than_bfloat_inputs(book: str, bits: int) -> None:
    """Of every code book with every number of bits."""
    weight = trellis(bits, book, (256, 256))
    found, rounded = losses(weight, CpuTrellis().pack(weight, CPU))
    assert found < rounded / 4, (found, rounded)
    assert found < 4e-4


LARGEST = {
    "codebooks": lambda: vectors(3, 8, 8),
    "codebooks, many blocks": lambda: vectors(3, 8, 8, shape=(400, 256)),
    **{
        f"codebooks of {length} rows": (lambda length=length: largest_outliers(length))
        for length in (4, 8, 16)
    },
}


def largest_outliers(length: int) -> QuantizedTensor:
    """Vectors of rows."""
    weight = row_vectors(length, 256, 256, shape=(32, 96), books=2, outliers=32)
    layout = weight.scheme.weight.vectors
    assert isinstance(layout, RowVectorLayout)
    weight.codes[:, : layout.outlier_bytes].view(torch.float16).fill_(3.33)
    return weight


@needs_native
@pytest.mark.parametrize("name", LARGEST)
def test_sums_of_the_largest_codebooks_stay_whole(name: str) -> None:
    """Every number of every codebook at its largest, and x too: no sum wraps around."""
    weight = LARGEST[name]()
    assert weight.codebooks is not None
    for sign in (1.0, -1.0):
        extreme = replace(weight, codebooks=torch.full_like(weight.codebooks, 7.77 * sign))
        packed = choose(weight.scheme, weight.shape, CPU).kernel.pack(extreme, CPU)
        for tokens in (1, 9):
            x = torch.full((tokens, weight.shape[1]), 3.3)
            wanted = x @ extreme.dequantize().T
            assert ((packed.kernel.linear(x, packed) - wanted).abs() <= 2e-4 * wanted.abs()).all()


@needs_native
def test_sums_of_the_largest_numbers_of_a_trellis_stay_whole() -> None:
    """All windows alike and the largest there is, x alike too: no sum wraps around."""
    for book in MULTIPLIERS:
        every = whole_number(book, torch.arange(1 << 16))
        # Of 8 bits a stream repeats every 2 weights, of 16 bits, so that half of the windows are the largest.
        for code in (int(every.argmax()), int(every.argmin())):
            weight = trellis(8, book, (128, 128))
            pieces = torch.tensor([code & 255, code >> 8], dtype=torch.uint8)
            weight = replace(weight, codes=pieces.repeat(128, weight.codes.shape[1] // 2))
            packed = CpuTrellis().pack(weight, CPU)
            assert isinstance(packed, TransformedWeight)
            numbers = trellis_numbers(weight)
            for tokens in (1, 9):
                x = torch.full((tokens, 128), 3.3)
                found = packed_linear.linear(x, packed.tiles)
                wanted = x.double() @ numbers.T
                assert ((found - wanted).abs() <= 1e-6 * wanted.abs().max()).all()


@needs_native
@pytest.mark.parametrize("book", MULTIPLIERS)
def test_numbers_of_a_trellis_are_float16s(book: str) -> None:
    """Every window of 16 bits, as rows of the tiles have them: exactly the definition's."""
    layout = trellis_format(8, book).trellis
    assert layout is not None
    weight = trellis(8, book, (256, 256))
    ones = replace(weight, scales=tuple(torch.ones_like(scale) for scale in weight.scales))
    packed = CpuTrellis().pack(ones, CPU)
    assert isinstance(packed, TransformedWeight)
    numbers = packed_linear.rows(packed.tiles, torch.arange(256))
    turn = Rotation.hadamard(BLOCK)
    turned = turn(turn(numbers).T.contiguous()).T
    assert (turned - ones.dequantize()).abs().max() <= 2.0**-10 * turned.abs().max()
    off = (numbers - trellis_numbers(weight)).abs()
    assert off.max() <= 2.0**-9 + 2.0**-11 and off.norm() / numbers.norm() < 3e-4
    assert torch.equal(numbers, numbers.half().float())


@needs_native
def test_every_code_of_a_lattice_is_its_vector() -> None:
    """All 65,536 of them as the tiles' rows have them, and as they are multiplied."""
    codes = torch.arange(1 << 16).view(-1, 64)
    weight = replace(lattice(shape=(1024, 512)), codes=LatticeLayout().codes([codes]))
    packed = CpuLattice().pack(weight, CPU)
    assert isinstance(packed, TransformedWeight)
    numbers = LatticeLayout().vectors(weight.codes)
    assert torch.equal(packed_linear.rows(packed.tiles, torch.arange(1024)), numbers)
    for tokens in (512, 1):
        assert torch.equal(packed_linear.linear(torch.eye(512)[:tokens], packed.tiles), numbers.T[:tokens])


@needs_native
@pytest.mark.parametrize(("divisor", "books"), [(3.45, (69, 20)), (0.9, (9, 10)), (3.14159, None)])
def test_two_codes_of_a_lattice_are_one_number(divisor: float, books: tuple[int, int] | None) -> None:
    """Every code beside another one; x lies there once, but for divisors that are no small fractions."""
    first = torch.arange(1 << 16).view(-1, 64)
    layout, weight = LatticeLayout(divisor), lattice(divisor, (1024, 512))
    weight = replace(weight, codes=layout.codes([first, first.flip(1) ^ 0x5A3C]))
    packed = CpuLattice().pack(weight, CPU)
    assert isinstance(packed, TransformedWeight)
    assert packed.tiles.description.columns == (1024 if books is None else 512)
    assert torch.equal(packed.kernel.unpack(packed).codes, weight.codes)
    if books is None:
        return
    single, (a, b) = LatticeLayout(), books
    one, other = (single.vectors(single.codes([words])) for words in layout.words(weight.codes))
    numbers = (a * 4 * one + b * 4 * other) * torch.tensor(1 / (4 * a))
    assert torch.allclose(numbers, layout.vectors(weight.codes), rtol=0, atol=2.0**-20)
    assert torch.equal(packed_linear.rows(packed.tiles, torch.arange(1024)), numbers)
    for tokens in (512, 1):
        assert torch.equal(packed_linear.linear(torch.eye(512)[:tokens], packed.tiles), numbers.T[:tokens])


@needs_native
@pytest.mark.parametrize("divisor", [0.0, 3.45])
def test_lattices_lose_less_than_bfloat_inputs(divisor: float) -> None:
    """Beside the product of the definition, most of it what float16 rounds there."""
    weight = lattice(divisor, (192, 256))
    exact, packed = weight.dequantize().double(), CpuLattice().pack(weight, CPU)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    wanted = x.double() @ exact.T
    found = float((packed.kernel.linear(x, packed).double() - wanted).norm() / wanted.norm())
    rounded = float((x.bfloat16().double() @ exact.T - wanted).norm() / wanted.norm())
    assert found < rounded / 4, (found, rounded)


@needs_native
@pytest.mark.parametrize(
    ("books", "bits", "length", "rows"),
    [(1, 8, 8, 410), (2, 8, 8, 1088), (4, 6, 32, 800), (1, 8, 2, 800), (1, 6, 2, 410), (1, 8, 4, 800)],
)
def test_products_of_codebooks_made_first_have_the_same_bits(
    books: int, bits: int, length: int, rows: int
) -> None:
    """Few tokens beside many rows may meet codebooks before indices do; so may a gate and its partner."""
    packed = CpuVectors().pack(vectors(books, bits, length, shape=(rows, 544)), CPU)
    x = torch.randn(9, 544, generator=torch.Generator().manual_seed(2))
    whole, layer = packed.kernel.linear(x, packed), Linear("gate_up", [packed], None)
    for tokens in (1, 2, 3, 4):
        assert torch.equal(packed.kernel.linear(x[:tokens], packed), whole[:tokens])
        if rows % 32 == 0:
            assert torch.equal(layer.gated(x[:tokens], "silu"), gated_activation(whole[:tokens], "silu"))


def kept(weight: QuantizedTensor) -> tuple[PackedWeight, Callable[..., PackedWeight]]:
    """A packed weight, and how it comes back from buffers some of which changed, or (None) are not there."""
    packed = choose(weight.scheme, weight.shape, CPU).kernel.pack(weight, CPU)

    def restore(**changed: torch.Tensor | None) -> PackedWeight:
        buffers = {name: buffer for name, buffer in (packed.buffers | changed).items() if buffer is not None}
        return packed.kernel.restore(packed.scheme, packed.shape, buffers, "test")

    return packed, restore


def small_row_vectors() -> QuantizedTensor:
    return row_vectors(8, 300, 20, shape=(16, 40), scale="f16")


@needs_native
@pytest.mark.parametrize(
    ("weight", "place", "words"),
    [
        (vectors(1, 12, 8), 32 + 1, "of a codebook of 4096 vectors"),
        (small_row_vectors(), 1, "index .* of a codebook of 300"),
        (small_row_vectors(), 128, "index 255 of a codebook of 20 vectors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_index_past_a_codebook_is_refused(weight: QuantizedTensor, place: int, words: str) -> None:
    """Kept packed weights that were damaged: nothing is read outside the table."""
    packed, restore = kept(weight)
    data = packed.buffers["data"].clone()
    data[place] = 0xFF
    with pytest.raises(ValueError, match=words):
        restore(data=data)


@needs_native
@pytest.mark.parametrize(
    "name",
    ["codebooks 1x16 of 8 (AQLM)", "codebooks of 8 rows, outliers", "trellis 4 mcg", "lattice (QuIP#)"],
)
def test_buffers_that_are_short_or_not_there_are_refused(name: str) -> None:
    packed, restore = kept(WEIGHTS[name]())
    for part, buffer in packed.buffers.items():
        with pytest.raises(ValueError, match=f"^test: .*({part}|packed bytes)"):
            restore(**{part: buffer.flatten()[:-1]})
        if part not in ("data", "table"):
            with pytest.raises(ValueError, match=f"^test: {part} is no "):
                restore(**{part: None})


@needs_native
def test_columns_of_vectors_of_rows_that_x_does_not_have_are_refused() -> None:
    """Nothing is read outside of x."""
    packed, restore = kept(small_row_vectors())
    for change in (1, -1):
        with pytest.raises(ValueError, match="no order of 40 columns"):
            restore(inputs=packed.buffers["inputs"] + change)
    padding = packed.buffers["inputs"].clone()
    padding[-1] = 0
    with pytest.raises(ValueError, match="columns that pad tiles"):
        restore(inputs=padding)
    with pytest.raises(ValueError, match="41 columns of 40"):
        layout = RowVectorLayout(8, 300, 20, books=2, width=20)
        scheme = replace(packed.scheme, weight=number_format(layout.name))
        packed.kernel.restore(scheme, (16, 41), packed.buffers, "test")


def of(name: str, *blocks: tuple[int, int], scale: str = "f16") -> Scheme:
    """A scheme of codebooks or of a trellis with such scales."""
    return Scheme(number_format(name), blocks, (number_format(scale),) * len(blocks))


TRELLIS, LATTICE = trellis(4, "mcg").scheme, lattice().scheme


@needs_native
@pytest.mark.parametrize(
    ("kernel", "scheme", "columns", "words"),
    [
        (CpuRowVectors(), of("rvq8_256_f16"), 64, None),
        (CpuRowVectors(), of("rvq2_256_f16"), 64, "vectors of 2 rows"),
        (CpuRowVectors(), of("rvq24_256_f16"), 64, "vectors of 24 rows"),
        (CpuRowVectors(), of("rvq8_65537_f16"), 64, "codebooks of 65537 vectors"),
        (CpuRowVectors(), of("rvq8_2+70000_f16"), 64, "codebooks of 70000 vectors"),
        (CpuRowVectors(), of("rvq8_256_f16", (1, 0)), 64, "one scale for all rows"),
        (CpuRowVectors(), of("vq1x8_8", (1, 0)), 64, "no vectors of rows"),
        (CpuVectors(), of("vq1x8_8", (1, 0)), 64, None),
        (CpuVectors(), of("vq1x8_8", (1, 0)), 60, "60 columns are no whole vectors of 8"),
        (CpuVectors(), of("vq1x8_8", (1, 32)), 64, None),
        (CpuVectors(), of("vq1x8_8", (1, 48)), 96, "needs one scale for a row, for 32 n columns of it"),
        (CpuVectors(), of("vq1x8_8", (0, 32)), 64, "needs one scale for a row"),
        (CpuVectors(), of("vq1x8_8", (1, 64)), 96, "96 columns are no whole groups of 64"),
        (CpuVectors(), of("vq1x8_2", (1, 64)), 64, None),
        (CpuVectors(), of("vq2x8_2", (1, 0)), 64, "2 codebooks of 8 bits and vectors of 2"),
        (CpuVectors(), of("vq1x9_4", (1, 0)), 64, "1 codebooks of 9 bits and vectors of 4"),
        (CpuVectors(), of("vq1x8_2x8", (2, 0)), 64, "vectors of 2 rows"),
        (CpuVectors(), of("vq1x8_8", (1, 0), scale="e4m3"), 64, "scales are e4m3"),
        (CpuVectors(), of("rvq8_256_f16"), 64, "no vectors of codebooks"),
        (CpuTrellis(), TRELLIS, 256, None),
        (CpuTrellis(), TRELLIS, 192, None),
        (CpuTrellis(), of("int4", (1, 32)), 256, "no trellis"),
        (CpuTrellis(), of(TRELLIS.weight.name, (1, 0)), 256, "each row and each column"),
        (CpuLattice(), LATTICE, 256, None),
        (CpuLattice(), replace(LATTICE, weight=number_format("e8p+e8/2.04")), 256, "codes of 8 bits"),
        (CpuLattice(), replace(LATTICE, blocks=((0, 1),), scales=LATTICE.scales[1:]), 256, None),
        (CpuLattice(), LATTICE, 96, "whole tiles"),
        (CpuLattice(), LATTICE, 704, "order 704"),
        (CpuLattice(), of("int4", (1, 32)), 256, "no vectors of a lattice"),
        (CpuLattice(), of(LATTICE.weight.name, (1, 0), scale="f32"), 256, "each row and each column"),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_kernels_of_codebooks_and_trellises_say_why_they_refuse(
    kernel: LinearKernel, scheme: Scheme, columns: int, words: str | None
) -> None:
    reason = kernel.refuses(scheme, (128, columns), CPU)
    assert reason is None if words is None else reason is not None and words in reason


@needs_native
@pytest.mark.parametrize("group", [0, 32, 16, 8])
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_every_8_bit_float_is_exact(name: str, group: int) -> None:
    """One code in each row, all others zero: no other row sees NaN, and subnormal numbers have all bits."""
    weight = canonical(name, group, "bf16", shape=(256, 96))  # 3 tiles
    rows = torch.arange(256)
    columns = rows * 7 % 96
    codes = torch.zeros_like(weight.codes)
    codes[rows, columns] = rows.to(torch.uint8)
    generator = torch.Generator().manual_seed(group)
    powers = torch.randint(-9, 9, weight.scales[0].shape, generator=generator).float().exp2()
    weight = replace(weight, codes=codes, scales=(powers.to(torch.bfloat16),))
    kernel = CpuBlocks()
    packed = kernel.pack(weight, CPU)
    x = torch.randint(-20, 20, (13, 96), generator=generator).float().exp2()
    exact = weight.dequantize()[rows, columns] * x[:, columns]
    assert exact.isnan().any() and (exact.isinf().any() or name != "e5m2")
    for tokens in (1, 2, 8, 9, 13):
        found = kernel.linear(x[:tokens], packed)
        torch.testing.assert_close(found, exact[:tokens], rtol=0, atol=0, equal_nan=True)


def ends_its_own_row(packed: PackedWeight, columns: tuple[int, ...]) -> None:
    """A number of x that is none, in one of these columns."""
    x = torch.randn(9, packed.shape[1], generator=torch.Generator().manual_seed(4))
    clean = packed.kernel.linear(x, packed)
    for fault in (float("nan"), float("inf"), float("-inf")):
        for column in columns:
            bad = x.clone()
            bad[3, column] = fault
            found = packed.kernel.linear(bad, packed)
            rest = [row for row in range(9) if row != 3]
            assert found[3].isnan().all() and torch.equal(found[rest], clean[rest])


@needs_native
@pytest.mark.parametrize(
    "name", ["codebooks 2x8 of 8 (AQLM)", "codebooks of 8 rows, outliers", "trellis 4 mcg", "lattice (QuIP#)"]
)
def test_faults_of_inputs_of_codebooks_and_trellises_end_their_own_row(name: str) -> None:
    ends_its_own_row(kept(WEIGHTS[name]())[0], (0, 100))


@needs_native
@pytest.mark.parametrize("shape", [(37, 256), (64, 272), (5, 16)])
def test_weights_with_outliers_are_the_float16_ones_but_for_their_roundings(shape: tuple[int, int]) -> None:
    """2^-11 of each result on the way to a weight, at most three, and as much of the least normal one."""
    weight = with_outliers(shape, 0.05)
    codes, outliers = unrounded(weight)
    defined = weight.dequantize().double()
    largest = 2 * codes.abs() + (codes + outliers).abs()
    assert torch.equal(defined.half().double(), defined)
    assert ((codes + outliers - defined).abs() <= 2.0**-11 * largest + 2.0**-24).all()
    assert not torch.equal(codes + outliers, defined)
    packed = CpuBlocks().pack(weight, CPU)
    assert torch.equal(packed.kernel.rows(packed, torch.arange(shape[0])).double(), defined)
    x = torch.randn(130, shape[1], generator=torch.Generator().manual_seed(1))
    found = packed.kernel.linear(x, packed).double()
    limit = (2.0**-8 if ROUNDS_INPUTS else 2.0**-10) * (x.abs().double() @ largest.T)
    assert ((found - x.double() @ defined.T).abs() <= limit).all()


def test_outliers_are_added_to_rounded_weights() -> None:
    """One by one in numpy's float16."""
    weight = with_outliers((4, 32), 0.3)
    assert weight.zeros is not None and weight.outliers is not None
    codes, scales, zeros = weight.codes.numpy(), weight.scales[0].numpy(), weight.zeros.numpy()
    added = {
        (int(row), int(column)): value
        for row, column, value in zip(
            weight.outliers.rows,
            weight.outliers.columns,
            weight.outliers.values(number_format("f16")).numpy(),
            strict=True,
        )
    }
    assert len(added) > 10
    for row in range(4):
        for column in range(32):
            wanted = scales[row, column // 16] * (codes[row, column].astype("f2") - zeros[row, column // 16])
            if (row, column) in added:
                wanted += added[row, column]
            assert wanted.dtype == "f2" and float(weight.dequantize()[row, column]) == float(wanted)


@needs_native
def test_damaged_outliers_are_refused() -> None:
    """Kept packed weights that were damaged: nothing is written outside a tile, or read past the end."""
    packed = CpuBlocks().pack(with_outliers((20, 48), 0.1), CPU)
    starts, entries = packed.buffers["outlier_starts"], packed.buffers["outliers"]

    def refused(**changed: torch.Tensor) -> str:
        with pytest.raises(ValueError, match="^test: ") as caught:
            packed.kernel.restore(packed.scheme, packed.shape, packed.buffers | changed, "test")
        return str(caught.value)

    falling = starts.clone()
    falling[1] = falling[2] + 1
    for damaged in (starts[:-1], starts + 1, starts.long(), falling):
        assert "no outliers of 20 rows" in refused(outlier_starts=damaged)
    assert "no outliers of 20 rows" in refused(outliers=entries[:-1])
    for at, column in ((0, 48), (-1, 0xFFFF)):
        outside = entries.clone()
        outside[at] = column
        assert "an outlier outside 20 x 48" in refused(outliers=outside)
    [row, *_] = (starts.diff() > 1).nonzero().flatten().tolist()
    for first in (entries[starts[row] + 1], entries[starts[row] + 1] + 1):  # twice, and falling
        moved = entries.clone()
        moved[starts[row]] = first
        assert "a row's outliers are in no ascending columns" in refused(outliers=moved)
    without = {name: buffer for name, buffer in packed.buffers.items() if name != "outliers"}
    with pytest.raises(ValueError, match="no outliers of 20 rows"):
        packed.kernel.restore(packed.scheme, packed.shape, without, "test")


@needs_native
def test_outliers_beside_other_codes_are_refused() -> None:
    scheme = with_outliers().scheme
    for other in (
        replace(scheme, weight=number_format("uint4")),
        replace(scheme, blocks=((1, 32),)),
        replace(scheme, scales=(number_format("bf16"),)),
        replace(scheme, outliers=number_format("bf16")),
        replace(scheme, zero="integer"),
    ):
        assert "outliers stand beside 3-bit codes" in str(CpuBlocks().refuses(other, (37, 256), CPU))


@needs_native
@pytest.mark.parametrize(
    "name",
    [
        *("nf4 g64", "nf4 g64 float zero (SINQ)", "nf4 g32 f32 offset"),
        *("int4 g32", "uint4 g64 bf16 offset", "uint8 g32 zero", "int4 g8"),
    ],
)
def test_faults_of_whole_numbers_end_their_own_row(name: str) -> None:
    _, packed = packed_for_words(name)
    ends_its_own_row(packed, (200,))
    assert (packed.kernel.linear(torch.full((1, 256), 1e-40), packed) == 0).all()


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_rows_are_the_dequantized_rows(kernel: LinearKernel, name: str) -> None:
    weight = WEIGHTS[name]()
    ids = torch.tensor([0, weight.shape[0] - 1, 5, 5, 16], dtype=torch.int32)
    packed = kernel.pack(weight, CPU)
    assert_rows(packed, kernel.rows(packed, ids).nan_to_num(), normal_form(weight)[ids.long()])


def assert_rows(packed: PackedWeight, rows: torch.Tensor, wanted: torch.Tensor) -> None:
    two_scales = "column_scale" in packed.buffers and len(packed.scheme.scales) == 2
    if two_scales or "row_scale" in packed.buffers:
        # (code * inner) * outer, and not code * (inner * outer): a last bit
        assert ((rows - wanted).abs() <= 2.0**-22 * wanted.abs()).all()
    else:
        assert torch.equal(rows, wanted)


@pytest.mark.parametrize(("kernel", "name"), NATIVE_PAIRS)
def test_a_row_does_not_depend_on_its_company(kernel: LinearKernel, name: str) -> None:
    weight = WEIGHTS[name]()
    packed = kernel.pack(weight, CPU)
    x = torch.randn(130, weight.shape[1], generator=torch.Generator().manual_seed(2))
    together = kernel.linear(x, packed)
    for row in (0, 1, 63, 64, 129):
        assert torch.equal(
            kernel.linear(x[row : row + 1], packed)[0].nan_to_num(), together[row].nan_to_num()
        )
    assert torch.equal(kernel.linear(x[40:77], packed).nan_to_num(), together[40:77].nan_to_num())
    native.set_threads(1)
    try:
        assert torch.equal(kernel.linear(x, packed).nan_to_num(), together.nan_to_num())
    finally:
        native.set_threads(2)


@needs_native
def test_a_row_of_subnormal_weights_does_not_depend_on_its_company() -> None:
    """Some products of bfloat16 take subnormal numbers as zeros, others do not; no kernel does both."""
    values = torch.tensor([[2.0**-130, 1e-3], [2.0**-126, 0.5]]).repeat(9, 40)[:17].bfloat16()
    packed = choose(dense("bf16"), (17, 80), CPU).kernel.pack(
        QuantizedTensor(dense("bf16"), (17, 80), values, origin="test"), CPU
    )
    x = torch.tensor([[2.0**125, 1.0], [2.0**-130, 2.0**-20], [1.0, 1.0]]).repeat(7, 40)
    together = packed.kernel.linear(x, packed)
    for row in range(3):
        assert torch.equal(packed.kernel.linear(x[row : row + 1], packed)[0], together[row])


def test_native_kernels_take_what_they_should() -> None:
    """A kernel that refuses everything would pass the rest of this file."""
    if native.library() is None:
        pytest.skip("no native library")
    fast = {p.values[1] for p in PAIRS if p.values[0].name.startswith("cpu_")}
    # GPUs alone keep vectors of several rows.
    assert set(WEIGHTS) - fast == {"codebooks 2x8 of 3 rows of 8"}


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (canonical("int4", 32, shape=(16, 96)), None),
        (canonical("int4", 48, "f32", shape=(16, 96)), None),
        (canonical("int4", 32, shape=(16, 40)), None),
        (canonical("int4", 1024, shape=(16, 1048)), None),
        (flat("nf4", 64), None),
        (replace(canonical("nf4", 0, "f32", shape=(16, 100)), scheme=flat("nf4", 64).scheme), "got 4"),
        (
            replace(canonical("uint4", 0, "f32", shape=(16, 200)), scheme=flat("uint4", 64).scheme),
            "would take",
        ),
        (ragged("int4", 128, 224), None),
        (canonical("e2m1", 16, "e8m0"), None),
        (canonical("int4", 4, shape=(16, 64)), "groups of a multiple of 8 columns, got 4"),
        (canonical("e4m3", 20, "f32", shape=(16, 80), block_rows=16), "multiple of 8 columns, got 20"),
        (canonical("int4", 40, "f32", shape=(48, 320), block_rows=48), "with a scale for each 8 columns"),
        (canonical("int7", 8, shape=(16, 64)), "int7 codes need groups of 16 or a multiple of 32, got 8"),
        (canonical("e4m3", 32, zero=True), "e4m3 codes with zero points or offsets"),
        (canonical("e5m2", 16, offset=True), "e5m2 codes with zero points or offsets"),
        (canonical("int4", 0, shape=(16, 40)), None),
        (canonical("e8m0", 64), "not exact in bfloat16"),
        (crooked(), "not exact in bfloat16 or have no packed form"),
        (dense_weight("f32", (8, 32)), "not quantized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blocks_say_why_they_refuse(weight: QuantizedTensor, words: str | None) -> None:
    if native.library() is None:
        pytest.skip("no native library")
    reason = CpuBlocks().refuses(weight.scheme, weight.shape, CPU)
    assert reason is None if words is None else reason is not None and words in reason


def test_more_refusals() -> None:
    blocks, floats = CpuBlocks(), CpuDense()
    weight = canonical("int4", 32)
    if native.library() is None:
        assert blocks.refuses(weight.scheme, weight.shape, CPU) == "the native library is not there"
        return
    assert "cuda" in str(blocks.refuses(weight.scheme, weight.shape, torch.device("cuda")))
    assert "experts" in str(blocks.refuses(weight.scheme, (4, *weight.shape), CPU))
    quantized_input = replace(weight.scheme, activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert "quantizes its input" in str(blocks.refuses(quantized_input, weight.shape, CPU))
    float_zero = replace(weight.scheme, zero="float", scales=(number_format("e8m0"),))
    assert "float zero points with e8m0" in str(blocks.refuses(float_zero, weight.shape, CPU))
    three = replace(weight.scheme, blocks=((1, 32),) * 3, scales=weight.scheme.scales * 3)
    assert "3 levels" in str(blocks.refuses(three, weight.shape, CPU))
    assert "quantized" in str(floats.refuses(weight.scheme, weight.shape, CPU))
    assert "experts" in str(floats.refuses(dense("f32"), (2, 8, 8), CPU))


def test_choice_keeps_the_reasons() -> None:
    weight = crooked()
    choice = choose(weight.scheme, weight.shape, CPU)
    assert choice.kernel.name == "reference"
    asked = [
        "cpu_blocks",
        "cpu_columns",
        "cpu_vectors",
        "cpu_row_vectors",
        "cpu_trellis",
        "cpu_lattice",
        "cpu_dense",
        "cpu_expanded",
    ]
    assert [name for name, _ in choice.refusals] == asked


@needs_native
def test_wrong_input_is_named() -> None:
    weight = canonical("int4", 32)
    packed = CpuBlocks().pack(weight, CPU)
    with pytest.raises(LowbitError, match="255 columns, weight 256"):
        packed.kernel.linear(torch.ones(1, 255), packed)
    with pytest.raises(LowbitError, match=r"outside 0\.\.36"):
        packed.kernel.rows(packed, torch.tensor([37]))


def moved(packed: NativeWeight, buffers: dict[str, torch.Tensor], rows: int) -> NativeWeight:
    """The same weight with its bytes somewhere else, told to have so many rows."""
    description = type(packed.description).from_buffer_copy(packed.description)
    description.data, description.table = buffers["data"].data_ptr(), buffers["table"].data_ptr()
    description.rows = rows
    return replace(
        packed,
        shape=(rows, packed.shape[1]),
        buffers=buffers,
        description=description,
        address=ctypes.addressof(description),
    )


@pytest.mark.parametrize(("kernel", "name"), NATIVE_PAIRS)
def test_nothing_past_the_end_is_touched(kernel: LinearKernel, name: str) -> None:
    """All that the native code is given ends at a guard page: what it packs, packed bytes, tables, x, ids."""
    weight = WEIGHTS[name]()
    guarded = replace(
        weight,
        codes=at_guard_page(weight.codes),
        codebooks=None if weight.codebooks is None else at_guard_page(weight.codebooks),
        scales=tuple(map(at_guard_page, weight.scales)),
        zeros=None if weight.zeros is None else at_guard_page(weight.zeros),
        row_groups=None if weight.row_groups is None else at_guard_page(weight.row_groups),
        outliers=None
        if weight.outliers is None
        else Outliers(at_guard_page(weight.outliers.starts), at_guard_page(weight.outliers.entries)),
        offsets=tuple(map(at_guard_page, weight.offsets)),
    )
    plain, packed = kernel.pack(weight, CPU), kernel.pack(guarded, CPU)
    assert all(torch.equal(packed.buffers[part], buffer) for part, buffer in plain.buffers.items())
    rows, columns = weight.shape
    buffers = {part: at_guard_page(buffer) for part, buffer in packed.buffers.items()}
    if (
        isinstance(packed, NativeWeight)
        and not isinstance(packed, RowVectorsWeight)
        and "outliers" not in buffers
    ):
        packed = moved(packed, buffers, rows)
    else:
        packed = kernel.restore(weight.scheme, weight.shape, buffers, weight.origin)
    x = torch.randn(13, columns, generator=torch.Generator().manual_seed(4))
    out = rows_at_guard_page(torch.full((13, rows), 7.0), rows + 3)
    found = kernel.linear(rows_at_guard_page(x, columns + 5), packed, out)
    assert torch.equal(found.nan_to_num(), kernel.linear(x, plain).nan_to_num())
    between = out.as_strided((12, 3), (rows + 3, 1), out.storage_offset() + rows)
    assert between.isnan().all(), "what lies between two rows of the output is not its"
    for ids in (torch.tensor([0, rows - 1, 5]), torch.tensor([rows - 1], dtype=torch.int32)):
        found = kernel.rows(packed, at_guard_page(ids))
        assert torch.equal(found.nan_to_num(), kernel.rows(plain, ids).nan_to_num())


ODD: dict[str, Callable[[int], QuantizedTensor]] = {
    "int4": lambda rows: canonical("int4", 32, shape=(rows, 96)),
    "uint3 zero act-order": lambda rows: canonical("uint3", 96, zero=True, order=True, shape=(rows, 96)),
    "int6 g16": lambda rows: canonical("int6", 16, shape=(rows, 32)),
    "uint7 bf16 offset": lambda rows: canonical("uint7", 32, "bf16", offset=True, shape=(rows, 32)),
    "int8 channel": lambda rows: canonical("int8", 0, "f32", shape=(rows, 160)),
    "e4m3 e8m0": lambda rows: canonical("e4m3", 32, "e8m0", shape=(rows, 64)),
    "nf4 g16": lambda rows: canonical("nf4", 16, shape=(rows, 32)),
    "uint4 whole columns": lambda rows: by_columns("uint4", 0, shape=(rows, 33)),
    "uint5 7x1 apart": lambda rows: by_columns("uint5", 7, shape=(rows, 70), apart=True),
    "uint8 tiles": lambda rows: in_tiles("uint8", 16, 9, shape=(rows, 48)),
    "q4_k": lambda rows: tensor_of("q4_k", random_blocks("q4_k", rows, 1)),
    "codebooks 1x16": lambda rows: vectors(1, 16, 8, shape=(rows, 40)),
    "codebooks 2x8 of 16": lambda rows: vectors(2, 8, 16, shape=(rows, 48)),
    "codebooks of 8 rows": lambda rows: row_vectors(8, 300, 20, shape=(rows, 40), scale="f16", order=True),
    "codebooks of 6 rows": lambda rows: row_vectors(6, 30, shape=(rows, 45), books=2, outliers=5),
    "codebooks of 16 rows": lambda rows: row_vectors(16, 200, shape=(rows, 33)),
    "outliers": lambda rows: with_outliers((rows, 80)),
    "outliers of 16 columns act-order": lambda rows: with_outliers((rows, 16), 0.3, order=True),
    "bf16": lambda rows: dense_weight("bf16", (rows, 31)),
    "f16": lambda rows: dense_weight("f16", (rows, 1)),
    "f32": lambda rows: dense_weight("f32", (rows, 33)),
}


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str, rows: int) -> None:
    """One row or just over a block of them, and every number of tokens up to past a tile of them."""
    weight = ODD[name](rows)
    kernel = choose(weight.scheme, weight.shape, CPU).kernel
    packed = kernel.pack(weight, CPU)
    assert isinstance(packed, (NativeWeight, ColumnsWeight))
    columns = weight.shape[1]
    x = torch.randn(70, columns + 3, generator=torch.Generator().manual_seed(rows))[:, :columns]
    together = kernel.linear(x, packed)
    expected, scale = rounded(weight, packed, x)
    if scale.isfinite().all() and scale.max() < 1e30:
        assert ((together.double() - expected).abs() / scale.clamp(min=1e-30)).max() < 3e-6
    for tokens in range(71):
        found = kernel.linear(x[:tokens], packed)
        assert torch.equal(found.nan_to_num(), together[:tokens].nan_to_num()), f"{tokens} tokens"
    assert_rows(packed, kernel.rows(packed, torch.arange(rows)).nan_to_num(), normal_form(weight))


def zeros_first() -> QuantizedTensor:
    """Vectors of rows; index 0 means zeros."""
    weight = row_vectors(8, 256, shape=(16, 2048))
    assert weight.codebooks is not None
    weight.codebooks[:, 0] = 0
    return weight


FAR = {
    "codebooks of 8 rows": zeros_first,
    "codebooks 1x8": lambda: vectors(1, 8, 8, shape=(16, 2048)),
    "int4": lambda: canonical("int4", 32, shape=(16, 2048)),
    "uint7 zero": lambda: canonical("uint7", 128, zero=True, shape=(16, 2048)),
    "bf16": lambda: dense_weight("bf16", (16, 2048)),
    "f32": lambda: dense_weight("f32", (16, 2048)),
}


def past_two_to_the_31(weight: QuantizedTensor) -> tuple[NativeWeight, NativeWeight]:
    """A packed weight of 16 rows, and one of 2.2e9 codes that ends with it; the rest are holes in memory."""
    small = choose(weight.scheme, weight.shape, CPU).kernel.pack(weight, CPU)
    assert isinstance(small, NativeWeight)
    blocks, block = 70_000, small.buffers["data"].numel()
    data = sparse_zeros((blocks * block,), torch.uint8)
    data[-block:] = small.buffers["data"]
    large = moved(small, small.buffers | {"data": data}, blocks * 16)
    assert large.shape[0] * large.shape[1] > 1 << 31
    return small, large


@needs_native
@pytest.mark.parametrize("name", FAR)
def test_rows_past_two_to_the_31(name: str) -> None:
    """The last rows of a weight of 2.2e9 codes."""
    small, large = past_two_to_the_31(FAR[name]())
    ids = torch.arange(large.shape[0] - 16, large.shape[0])
    assert torch.equal(large.kernel.rows(large, ids), small.kernel.rows(small, torch.arange(16)))


@needs_native
@pytest.mark.parametrize("name", FAR)
def test_inputs_and_outputs_past_two_to_the_31(name: str) -> None:
    """Rows of x and of the output that lie gigabytes apart."""
    weight = FAR[name]()
    packed = choose(weight.scheme, weight.shape, CPU).kernel.pack(weight, CPU)
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(9))
    out = far_apart(torch.full((3, 16), torch.nan))
    found = packed.kernel.linear(far_apart(x), packed, out)
    assert found is out and torch.equal(found, packed.kernel.linear(x, packed))


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("name", FAR)
def test_products_past_two_to_the_31(name: str) -> None:
    """All of a weight of 2.2e9 codes: the holes read as zero codes, the last rows as what they are."""
    small, large = past_two_to_the_31(FAR[name]())
    x = torch.randn(2, 2048, generator=torch.Generator().manual_seed(9))
    found = large.kernel.linear(x, large)
    assert torch.equal(found[:, -16:], small.kernel.linear(x, small))
    assert not found[:, :-16].any(), "scales are zero there"


@needs_native
@pytest.mark.slow
def test_packing_past_two_to_the_31() -> None:
    """2.1e9 codes of 2 bits, of which the last 16 rows are not zero."""
    small = canonical("uint2", 0, shape=(16, 2048))
    rows = (1 << 20) + 32
    codes = sparse_zeros((rows, 2048), torch.uint8)
    codes[-16:] = small.codes
    scales = small.scales[0].repeat(rows // 16, 1)
    assert codes.numel() > 1 << 31
    large = replace(small, shape=(rows, 2048), codes=codes, scales=(scales,))
    kernel = choose(large.scheme, large.shape, CPU).kernel
    found = kernel.rows(kernel.pack(large, CPU), torch.arange(rows - 16, rows))
    assert torch.equal(found, small.dequantize())
