"""cpu_vectors: formats of codebooks (AQLM, HIGGS) as files hold them: indices of vectors of columns. A scale
is a row's, or of 32, 64 … columns of one.

The codebooks become whole numbers of 16 bits over one factor, and x whole numbers of 15 with a scale for each
32 columns (csrc/linear_vectors.h): products and their sums over 32 columns are exact in 32 bits, what follows
is float32. The factor is the least with which no sum can pass 32 bits, or the power of two above it where
that makes every number exact (lattices). A weight is then off by at most half of it for each codebook: of
normal numbers about 2^-13 of their deviation for one codebook, 2^-12 for two, or for one of vectors of 2 or
4. With x's own rounding that is less than an eighth, or a sixth, of what bfloat16 costs the inputs of other
formats, and a third for four codebooks, the most there may be. Rows that are looked up have the same numbers.

Codebooks are a weight's own: parts of a layer that have each their own are not fused, and x is laid out anew
for each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import (
    COLUMNS,
    MOST_BOOKS,
    ROWS,
    SCALE_DTYPES,
    SCALE_KINDS,
    SHORT_LENGTHS,
    SHORT_VECTORS,
    VECTOR_LENGTHS,
    Description,
    NativeWeight,
)
from lowbit.kernels.whole_numbers import LARGEST_SUM, LARGEST_WORD, factor_from, in_words
from lowbit.numerics.number_formats import VectorLayout
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_LANES = 4  # rows 4 l + j of a tile stand at j * 4 + l; those of short vectors v at l * 16 + v * 4 + j
_TOGETHER = 4  # short vectors


class CpuVectors(NativeKernel):
    """See the module docstring."""

    name = "cpu_vectors"
    layout = 3

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        layout = scheme.weight.vectors
        if not isinstance(layout, VectorLayout):
            return "weights are no vectors of codebooks"
        if layout.length not in VECTOR_LENGTHS or layout.books > MOST_BOOKS:
            return f"{layout.books} codebooks of vectors of {layout.length}"
        if layout.length in SHORT_LENGTHS and (layout.books > 1 or layout.bits > 8):
            return f"{layout.books} codebooks of {layout.bits} bits and vectors of {layout.length}"
        if layout.height > 1:
            return f"vectors of {layout.height} rows"
        if shape[1] % layout.length:
            return f"{shape[1]} columns are no whole vectors of {layout.length}"
        plain = scheme.zero == "none" and not scheme.offset and not scheme.flattened
        height, group = scheme.blocks[0] if len(scheme.blocks) == 1 else (0, 1)
        if not plain or height > 1 or group % COLUMNS or (group and not height):
            return f"needs one scale for a row, for {COLUMNS} n columns of it, or for all, and nothing added"
        if group and shape[1] % group:
            return f"{shape[1]} columns are no whole groups of {group}"
        if scheme.scales[0].name not in SCALE_KINDS:
            return f"scales are {scheme.scales[0].name}"
        return None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of indices and scales."""
        return _describe(scheme, shape).nbytes

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Indices in tiles behind each block's scales; the codebooks as whole numbers."""
        layout, codebooks = weight.scheme.weight.vectors, weight.codebooks
        assert isinstance(layout, VectorLayout) and codebooks is not None, "refuses() was asked first"
        described = _describe(weight.scheme, weight.shape)
        words, factor = whole_numbers(codebooks)
        table = torch.zeros(described.table_size // 2, dtype=torch.int16)
        table[: words.numel()] = words.flatten()
        if layout.length in SHORT_LENGTHS:
            numbers, planes = table.chunk(2)
            planes.copy_(numbers.view(torch.uint8).view(SHORT_VECTORS, -1).T.flatten().view(torch.int16))
        buffers = {
            "data": _tiles(weight.codes, weight.scales[0].expand(weight.shape[0], -1), layout, described),
            "table": table,
            "factor": torch.tensor(factor, dtype=torch.float32),
        }
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order.clone()
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        self.check(scheme, shape, origin)
        packed_linear.check_buffers(buffers, {"factor": ((), torch.float32)}, origin)
        packed_linear.check_order(buffers.get("column_order"), shape[1], origin)
        described = _describe(scheme, shape)
        described.factor = float(buffers["factor"])
        packed = packed_linear.around(self, described, scheme, shape, buffers, origin)
        layout = scheme.weight.vectors
        assert isinstance(layout, VectorLayout), "it was not refused"
        if layout.bits not in (8, 16):
            most = int(layout.indices(_codes(packed)).max())
            if most >= 1 << layout.bits:
                raise ValueError(f"{origin}: index {most} of a codebook of {1 << layout.bits} vectors")
        return packed

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again, with the codebooks that are multiplied."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        layout = packed.scheme.weight.vectors
        assert isinstance(layout, VectorLayout), "it was packed"
        size = layout.books * (layout.length << layout.bits)
        words = packed.buffers["table"][:size].view(layout.books, -1, layout.length)
        return QuantizedTensor(
            packed.scheme,
            packed.shape,
            _codes(packed),
            (_scales(packed),),
            column_order=packed.buffers.get("column_order"),
            origin=packed.origin,
            codebooks=words.float() * packed.buffers["factor"],
        )


def whole_numbers(codebooks: Tensor) -> tuple[Tensor, float]:
    """int16 (books, vectors, length), and what they are multiplied with to be worth what the codebooks say.

    Sums of the books' numbers fit int16; sums of 32 columns, times x of 15 bits, fit int32.
    """
    books = codebooks.double()
    sizes = books.abs().sum(-1).amax(1).sum()  # of the largest sum of vectors
    largest = books.abs().amax((1, 2)).sum()
    # Each number is rounded: half of one more for every codebook.
    half = len(books) / 2
    room = LARGEST_SUM / COLUMNS - half
    least = max(float(sizes) / books.shape[-1] / room, float(largest) / (LARGEST_WORD - half))
    # A float32, and not one below the least.
    factor = float(torch.nextafter(torch.tensor(least, dtype=torch.float32), torch.tensor(math.inf)))
    factor = factor_from(factor if least else 0.0, books)
    return in_words(books, factor), factor


def _describe(scheme: Scheme, shape: tuple[int, ...]) -> Description:
    """The native description, columns padded to whole tiles."""
    layout = scheme.weight.vectors
    assert isinstance(layout, VectorLayout), "refuses() was asked first"
    codes, scales = packed_linear.vector_codes(layout), SCALE_KINDS[scheme.scales[0].name]
    return Description.plain(shape, codes, scales, scheme.blocks[0][1] or None)


def _tiles(codes: Tensor, scales: Tensor, layout: VectorLayout, described: Description) -> Tensor:
    """uint8: blocks of groups of 16 scales and tiles. ``codes`` (rows, bytes), ``scales`` (rows, groups)."""
    rows, groups = scales.shape
    blocks, tiles = -(-rows // ROWS), described.unit // COLUMNS  # of a group
    head = ROWS * scales.element_size()
    size = ROWS * layout.row_bytes(COLUMNS)
    data = torch.zeros(blocks, groups, head + tiles * size, dtype=torch.uint8)
    padded_scales = torch.zeros(blocks * ROWS, groups, dtype=scales.dtype)
    padded_scales[:rows] = scales
    in_blocks = padded_scales.view(blocks, ROWS, groups).transpose(1, 2).contiguous()
    data[:, :, :head] = in_blocks.view(torch.uint8)
    padded = torch.zeros(blocks * ROWS, layout.row_bytes(described.columns), dtype=torch.uint8)
    padded[:rows, : codes.shape[1]] = codes
    parted = padded.view(blocks, _LANES, ROWS // _LANES, groups, tiles, *_vectors_of_row(layout))
    data[:, :, head:] = parted.permute(_packed_order(layout)).reshape(blocks, groups, -1)
    return data.flatten()


def _vectors_of_row(layout: VectorLayout) -> tuple[int, ...]:
    """A row's indices in a tile: (vectors, in fours if they are short; books; bytes)."""
    vectors = COLUMNS // layout.length
    fours = (vectors // _TOGETHER, _TOGETHER) if layout.length in SHORT_LENGTHS else (vectors,)
    return (*fours, layout.books, layout.index_bytes)


def _packed_order(layout: VectorLayout) -> tuple[int, ...]:
    """Of (blocks, lanes, j, groups, tiles, ``_vectors_of_row``): where each packed dimension comes from."""
    if layout.length in SHORT_LENGTHS:
        return (0, 3, 4, 7, 5, 1, 6, 2, 8)
    return (0, 3, 4, 6, 5, 2, 1, 7)


def _groups(packed: NativeWeight) -> Tensor:
    """uint8 (blocks, groups, bytes) of the packed weight."""
    described = packed.description
    return packed.buffers["data"].view(-(-described.rows // ROWS), described.columns // described.unit, -1)


def _codes(packed: NativeWeight) -> Tensor:
    """uint8 (rows, bytes): the inverse of ``_tiles``."""
    described, layout = packed.description, packed.scheme.weight.vectors
    assert isinstance(layout, VectorLayout), "it was packed"
    data = _groups(packed)[:, :, described.scale_size :]
    blocks, groups = data.shape[:2]
    tiles, order = described.unit // COLUMNS, _packed_order(layout)
    parted = (blocks, _LANES, ROWS // _LANES, groups, tiles, *_vectors_of_row(layout))
    stored = data.reshape([parted[place] for place in order])
    rows = stored.permute([order.index(place) for place in range(len(order))]).reshape(blocks * ROWS, -1)
    return rows[: described.rows, : layout.row_bytes(packed.columns)].contiguous()


def _scales(packed: NativeWeight) -> Tensor:
    """(rows, groups), or the one of all."""
    described = packed.description
    stored = _groups(packed)[:, :, : described.scale_size].contiguous()
    scales = stored.view(SCALE_DTYPES[described.scales]).transpose(1, 2).flatten(0, 1)
    return scales[: 1 if packed.scheme.blocks[0][0] == 0 else described.rows].contiguous()
