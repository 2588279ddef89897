"""gpu_vectors: codebooks (AQLM) on NVIDIA GPUs as files hold them: indices of vectors of columns, or of as
many columns in each of some rows, which share an index and a scale.

Three launches: x becomes float16 with a scale for each 128 columns (``half_inputs``), in the order that the
weight's columns have; the codebooks' vectors are gathered, added up and multiplied, on CUDA cores for one
token and on tensor cores for more, with float32 sums that the rows' scales meet (``vector_products``); where
columns are split, the splits are added. For one token nothing is rounded but x. For more, sums of vectors are
float16, 2^-12 of each, after a power of two that lets them fit; numbers of one float16 codebook stay exact.

Codebooks of 65,536 vectors (1 MiB) stay in the L2 cache, from which each vector of 8 columns is 16 bytes:
eight times what its index takes from memory, so a few tokens of such a weight wait for the L2 cache, with
loads of three steps in flight. Small ones (4 KiB for 256 vectors) stay in the L1 cache. Loads that run ahead
of their step pass it by, so for a few tokens those have none, and other warps hide what a step waits for.
**None of it has run on a GPU**: it is proven in Triton's interpreter, and compiled.

    buffers   indices        uint8, or int16 for more than 8 bits: (books, out / height, in / length)
              codebooks      (books, 2^bits, height * length), as in the file
              scale          (out / height, 1), or (1, 1)
              column_order   int64 (in,), where there is one
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.gpu_kernel import (
    SPLIT_COLUMNS,
    Blocks,
    GpuKernel,
    add,
    expert_blocks,
    half_blocks,
    halves_of,
    unfit,
)
from lowbit.kernels.gpu.programs import Cut, Shape
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.number_formats import VectorLayout
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.kernels.gpu.expert_rows import SortedPairs

STEP = 64  # columns of a program's step
BLOCK = 128  # columns that share a scale of x
_LENGTHS = (2, 4, 8, 16, 32, 64)
_MOST_BITS, _MOST_BOOKS, _MOST_ROWS = 16, 8, 16
_IN_L1 = 64 << 10  # bytes of codebooks
_FEW = 16  # tokens


@dataclass(frozen=True)
class Codes:
    """What the kernels of ``vector_products`` read of a weight; ``order``, ``multiplier``: of its inputs."""

    indices: Tensor
    second: Tensor | None
    codebooks: Tensor
    row_scale: Tensor | None
    order: Tensor | None
    multiplier: Tensor | None
    rows: int
    height: int
    width: int
    blocks: int
    book_steps: int
    factor: float
    run_bytes: int  # of a row in a step
    constants: dict[str, int | bool]


@dataclass(frozen=True)
class VectorsWeight(PackedWeight):
    """A weight of ``GpuVectors``."""

    codes: Codes = field(kw_only=True, repr=False)


class GpuVectors(GpuKernel):
    """See the module docstring."""

    name = "gpu_vectors"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := unfit(scheme, shape, device):
            return reason
        layout = scheme.weight.vectors
        if not isinstance(layout, VectorLayout):
            return "weights are no vectors of codebooks"
        if layout.length not in _LENGTHS or layout.bits > _MOST_BITS or layout.books > _MOST_BOOKS:
            return f"{layout.books} codebooks of {layout.bits} bits and vectors of {layout.length}"
        if layout.height > _MOST_ROWS:
            return f"vectors of {layout.height} rows"
        if shape[0] % layout.height or shape[1] % layout.length:
            return f"{shape[0]} x {shape[1]} are no whole vectors of {layout.height} x {layout.length}"
        plain = scheme.zero == "none" and not scheme.offset and not scheme.flattened
        if not plain or len(scheme.blocks) != 1 or scheme.blocks[0] not in ((layout.height, 0), (0, 0)):
            return "needs one scale for a vector's rows, or for all, and nothing that is added"
        if scheme.scales[0].name not in ("f16", "bf16", "f32"):
            return f"scales are {scheme.scales[0].name}"
        return None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of indices and scales."""
        layout = _layout(scheme)
        height = shape[0] // layout.height
        scales = height if scheme.blocks[0][0] else 1
        return height * layout.row_bytes(shape[1]) + scales * int(scheme.scales[0].bits) // 8

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same indices, one codebook's behind another's."""
        layout, codebooks = _layout(weight.scheme), weight.codebooks
        assert codebooks is not None, "a format with vectors has them"
        codes = weight.codes.to(device, copy=True).unflatten(-1, (-1, layout.books, layout.index_bytes))
        planes = codes.permute(2, 0, 1, 3).contiguous()
        buffers = {
            "indices": (planes if layout.index_bytes == 1 else planes.view(torch.int16)).squeeze(-1),
            "codebooks": codebooks.to(device, copy=True).contiguous(),
            "scale": weight.scales[0].to(device, copy=True).contiguous(),
        }
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order.to(device, copy=True)
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        layout, (rows, columns) = _layout(scheme), shape
        height, numbers = rows // layout.height, layout.height * layout.length
        scales = height if scheme.blocks[0][0] else 1
        index_type = torch.uint8 if layout.index_bytes == 1 else torch.int16
        check_buffer(buffers, "indices", (layout.books, height, columns // layout.length), origin, index_type)
        check_buffer(buffers, "codebooks", (layout.books, 1 << layout.bits, numbers), origin)
        check_buffer(buffers, "scale", (scales, 1), origin)
        order = buffers.get("column_order")
        if order is not None:
            check_buffer(buffers, "column_order", (columns,), origin, torch.int64)
            if not torch.equal(order.sort().values, torch.arange(columns, device=order.device)):
                raise ValueError(f"{origin}: no order of {columns} columns")
        blocks, books = -(-columns // BLOCK), buffers["codebooks"]
        codes = Codes(
            indices=buffers["indices"],
            second=None,
            codebooks=books,
            row_scale=buffers["scale"],
            order=None if order is None else padded(order.int(), blocks * BLOCK, -1),
            multiplier=None,
            rows=rows,
            height=height,
            width=columns // layout.length,
            blocks=blocks,
            book_steps=1,
            factor=factor_of(float(books.float().abs().amax((1, 2)).sum())),
            run_bytes=max(layout.row_bytes(STEP) // layout.height, 1),
            constants={
                "BOOKS": layout.books,
                "MOST": (1 << layout.bits) - 1,
                "SECOND": 0,
                "LENGTH": layout.length,
                "L": layout.length,
                "ROWS": layout.height,
                "TALL": False,
                "ONE_SCALE": scales == 1,
            },
        )
        return VectorsWeight(self, scheme, shape, buffers, origin, codes=codes)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        layout = _layout(packed.scheme)
        indices = packed.buffers["indices"].permute(1, 2, 0).contiguous()
        codes = indices.view(torch.uint8).reshape(len(indices), -1)
        return QuantizedTensor(
            packed.scheme,
            packed.shape,
            codes[:, : layout.row_bytes(packed.shape[1])],
            (packed.buffers["scale"],),
            column_order=packed.buffers.get("column_order"),
            origin=packed.origin,
            codebooks=packed.buffers["codebooks"],
        )

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        assert isinstance(packed, VectorsWeight), "packed by this kernel"
        multiply(x, packed.codes, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in); ids outside the weight are not told, as that would wait for the GPU."""
        layout, picked = _layout(packed.scheme), ids.long().clamp(0, packed.shape[0] - 1)
        place, picked = picked % layout.height, picked // layout.height
        books, scale = packed.buffers["codebooks"].float(), packed.buffers["scale"].float()
        total = torch.zeros(len(ids), packed.shape[1], device=ids.device)
        for book, indices in zip(books, packed.buffers["indices"], strict=True):
            index = indices.index_select(0, picked).int() & len(book) - 1
            vectors = book.unflatten(1, (layout.height, layout.length))
            total += vectors[index.long(), place.unsqueeze(1)].flatten(-2)
        total *= scale if len(scale) == 1 else scale.index_select(0, picked)
        order = packed.buffers.get("column_order")
        return total if order is None else torch.empty_like(total).index_copy_(1, order, total)


def _layout(scheme: Scheme) -> VectorLayout:
    layout = scheme.weight.vectors
    assert isinstance(layout, VectorLayout), "refuses() was asked first"
    return layout


def check_buffer(
    buffers: dict[str, Tensor],
    name: str,
    size: tuple[int, ...],
    origin: str,
    dtype: torch.dtype | None = None,
) -> None:
    """ValueError where a buffer is not there, or of another size or type; None: any float's."""
    found = buffers.get(name)
    fits = found is not None and found.shape == size
    if found is None or not fits or (found.dtype is not dtype if dtype else not found.is_floating_point()):
        raise ValueError(f"{origin}: no {name} of {dtype or 'floats'} {list(size)}")


def padded(numbers: Tensor, size: int, filler: float) -> Tensor:
    """(n,) -> (size,), ``filler`` behind."""
    return torch.nn.functional.pad(numbers, (0, size - len(numbers)), value=filler)


def factor_of(largest: float) -> float:
    """The power of two that brings the largest number to 2^14 … 2^15, which float16 holds."""
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** min(max(15 - math.frexp(largest)[1], -100), 100)


def multiply(x: Tensor, codes: Codes, out: Tensor, more: Tensor | None = None) -> None:
    """out (tokens, rows) = x (tokens, inputs) @ weight.T, + ``more`` float32 (tokens, rows)."""
    from lowbit.kernels.gpu.vector_products import coded_vector

    tokens, rows, blocks = len(x), codes.rows, codes.blocks
    seen, scale = halves_of(x, codes.blocks, codes.order, codes.multiplier)
    # Rows as the programs have them: of vectors that run down, padded to powers of two.
    length, whole = codes.constants["LENGTH"], codes.constants["L"]
    own = codes.height * whole if codes.constants["TALL"] else rows
    steps = blocks * (BLOCK // STEP)
    shape = Shape(own, steps, codes.run_bytes * length // whole, STEP, SPLIT_COLUMNS // STEP)
    chosen, one = half_blocks(shape, tokens, x.device)
    stages = _stages(codes, tokens, chosen)
    splits = one.splits + (more is not None)
    parts = out if splits == 1 else torch.empty(splits, tokens, rows, device=x.device)
    if more is not None:
        parts[-1] = more
    if tokens == 1:
        runtime.launch(
            coded_vector,
            (-(-own // one.height), one.splits),
            *(seen, scale, parts, *_pointers(codes), rows, *_ends(codes, one)),
            num_warps=chosen.num_warps,
            **codes.constants,
            BN=one.height,
            STAGES=stages,
        )
    else:
        _tiles(seen, scale, codes, own, parts, tokens, chosen, one)
    if splits > 1:
        add(parts, out)


def _stages(codes: Codes, tokens: int, chosen: Blocks) -> int:
    """Of loads: one where codebooks are in the L1 cache."""
    cached = codes.codebooks.nbytes <= _IN_L1 and tokens <= _FEW
    return 1 if cached else chosen.num_stages


def _pointers(codes: Codes) -> tuple[Tensor | None, ...]:
    return codes.indices, codes.second, codes.codebooks, codes.row_scale


def _ends(codes: Codes, one: Cut) -> tuple[int, ...]:
    """Sizes, and how columns are cut."""
    return codes.height, codes.width, codes.blocks * (BLOCK // STEP), one.each, codes.book_steps


def _tiles(
    seen: Tensor,
    scale: Tensor,
    codes: Codes,
    own: int,
    parts: Tensor,
    tokens: int,
    chosen: Blocks,
    one: Cut,
    sorted_: SortedPairs | None = None,
    same: int = 1,
    books: int = 0,
) -> None:
    """Products into ``parts`` (..., tokens, rows), of ``own`` rows as programs have them; ``same`` pairs of
    experts have one row of x, and each expert ``books`` numbers of codebooks of its own."""
    from lowbit.kernels.gpu.vector_products import coded_tile

    token_blocks = -(-tokens // chosen.BM) if sorted_ is None else sorted_.blocks
    experts = (None, None) if sorted_ is None else (sorted_.rows, sorted_.experts)
    runtime.launch(
        coded_tile,
        (-(-own // one.height) * token_blocks, one.splits),
        *(seen, scale, parts, *_pointers(codes), *experts),
        *(tokens, token_blocks, codes.rows, parts.stride(-2), *_ends(codes, one)),
        *(books, codes.factor, 1 / codes.factor),
        num_warps=chosen.num_warps,
        num_stages=_stages(codes, tokens, chosen),
        SAME=same,
        **codes.constants,
        BM=chosen.BM,
        BN=one.height,
    )


@dataclass(frozen=True, eq=False)
class VectorsStack:
    """One weight of every expert: indices, codebooks and scales of ``codes`` are (experts, ...)."""

    shape: tuple[int, int]
    codes: Codes

    most_rows = 128
    gates = False  # an activation is a launch of its own

    @staticmethod
    def of(weights: Sequence[PackedWeight], buffers: dict[str, Tensor]) -> VectorsStack:
        """Of weights without an order of columns, around their stacked buffers."""
        known = [weight.codes for weight in weights if isinstance(weight, VectorsWeight)]
        codes = replace(
            known[0],
            indices=buffers["indices"],
            codebooks=buffers["codebooks"],
            row_scale=buffers["scale"],
            factor=min(one.factor for one in known),  # of the largest numbers
        )
        rows, columns = weights[0].shape
        return VectorsStack((rows, columns), codes)

    def multiply(self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, out: Tensor) -> None:
        """out (pairs, rows): row ``pair // divisor`` of x by the matrix of its expert.

        ``chosen``: int64 (pairs,), which ``sorted_`` has in order. Columns are not split: the experts are
        many.
        """
        rows = self.shape[0]
        seen, scale = halves_of(x, self.codes.blocks, self.codes.order, self.codes.multiplier)
        multiply_experts(seen, scale, self.codes, rows, sorted_, out, divisor, len(self.codes.codebooks))


def multiply_experts(
    seen: Tensor,
    scale: Tensor,
    codes: Codes,
    own: int,
    sorted_: SortedPairs,
    out: Tensor,
    same: int = 1,
    experts: int = 0,
) -> None:
    """out (pairs, rows): each row of x in float16 by its expert's weight; ``same`` pairs have one.

    ``own``: rows as programs have them. ``experts``: that have codebooks of their own; 0: all have the same.
    """
    blocks, cut = expert_blocks(sorted_, own, codes.blocks * (BLOCK // STEP), out.device)
    books = codes.codebooks.numel() // experts if experts else 0
    _tiles(seen, scale, codes, own, out, len(out), blocks, cut, sorted_, same, books)
