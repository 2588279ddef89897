"""gpu_row_vectors: indices of vectors that run down a column (VPTQ) on NVIDIA GPUs, as files hold them.

x takes over each column's scale before it becomes float16 (``half_inputs``), and what is added to a column
gives the same number for all rows of a token:

    sum over c of (w[r, c] s[c] + b[c]) x[c] = sum of w[r, c] (s[c] x[c]) + sum of b[c] x[c]

Vectors are gathered and multiplied as ``gpu_vectors`` does it, with which the launches are shared; the few
outliers, columns that are kept number by number, and the second sum are products of torch's in float32, added
with the splits; those of a mixture's experts are multiplied as plain matrices of experts are. A book's
columns are padded to whole blocks of 128, a vector's rows to a power of two (of 12 rows a quarter of the
numbers is made in vain). **None of it has run on a GPU**: it is proven in Triton's interpreter, and compiled.

    buffers   indices, second   uint8, or int16 for more than 256 vectors: (vectors of rows, padded columns)
              codebooks         (books, centroids + residual, 2, 4, 8 or 16), in the file's type
              outliers          (rows of whole vectors, outliers), in the file's type
              scale, offset     (1, in), where there is something
              column_order      int64 (in,), where there is one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.kernels import row_vector_rules
from lowbit.kernels.gpu.gpu_kernel import GpuKernel, halves_of, unfit
from lowbit.kernels.gpu.vectors import (
    BLOCK,
    STEP,
    Codes,
    check_buffer,
    factor_of,
    multiply,
    multiply_experts,
)
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.number_formats import RowVectorLayout
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.kernels.gpu.expert_rows import SortedPairs

_LENGTHS = range(2, 17)  # rows of a vector


@dataclass(frozen=True)
class _Sizes:
    """How a weight lies. ``width``: columns of a book, ``padded`` to whole blocks."""

    layout: RowVectorLayout
    rows: int
    columns: int

    @property
    def height(self) -> int:
        """Vectors of a column."""
        return -(-self.rows // self.layout.length)

    @property
    def width(self) -> int:
        return self.layout.width or self.columns

    @property
    def padded(self) -> int:
        return -(-self.width // BLOCK) * BLOCK

    @property
    def stride(self) -> int:
        """Numbers of a vector in the codebooks."""
        return 1 << (self.layout.length - 1).bit_length()

    def spread(self, of: Tensor, filler: float) -> Tensor:
        """(…, columns of all books) -> (…, padded columns of all books)."""
        books = of.unflatten(-1, (self.layout.books, self.width))
        return pad(books, (0, self.padded - self.width), value=filler).flatten(-2)

    def gathered(self, of: Tensor) -> Tensor:
        """The inverse of ``spread``."""
        return of.unflatten(-1, (self.layout.books, -1))[..., : self.width].flatten(-2)


@dataclass(frozen=True)
class _Apart:
    """What torch multiplies: ``inputs`` of the outliers, and what multiplies them; offsets of all inputs."""

    inputs: Tensor | None
    multiplier: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class RowVectorsWeight(PackedWeight):
    """A weight of ``GpuRowVectors``."""

    codes: Codes = field(kw_only=True, repr=False)
    apart: _Apart = field(kw_only=True, repr=False)


class GpuRowVectors(GpuKernel):
    """See the module docstring."""

    name = "gpu_row_vectors"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := unfit(scheme, shape, device):
            return reason
        return row_vector_rules.unfit(scheme, shape[1], _LENGTHS)

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of indices and outliers, and of the columns' numbers."""
        sizes = _sizes(scheme, shape)
        layout, books = sizes.layout, sizes.layout.books
        total = sizes.height * (books * sizes.padded * sum(layout.index_bytes) + layout.outlier_bytes)
        numbers = sum(int(scale.bits) // 8 for scale in scheme.scales) * (2 if scheme.offset else 1)
        return total + shape[1] * numbers

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same indices, each codebook's by itself."""
        sizes, codebooks = _sizes(weight.scheme, weight.shape), weight.codebooks
        assert codebooks is not None, "a format with vectors has them"
        layout = sizes.layout
        codes = weight.codes.cpu()
        buffers = {"codebooks": pad(codebooks, (0, sizes.stride - layout.length))}
        for name, indices, size in zip(
            ("indices", "second"), layout.indices(codes), layout.index_bytes, strict=True
        ):
            if indices is not None:
                buffers[name] = sizes.spread(indices.to(_index_type(size)), 0)
        if layout.outliers:
            buffers["outliers"] = layout.outlier_numbers(codes).transpose(1, 2).flatten(0, 1)
        if weight.scales:
            buffers["scale"] = weight.scales[0]
        if weight.offsets:
            buffers["offset"] = weight.offsets[0]
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order
        there = {name: buffer.to(device, copy=True).contiguous() for name, buffer in buffers.items()}
        return self.restore(weight.scheme, weight.shape, there, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        sizes = _sizes(scheme, shape)
        layout, (rows, columns) = sizes.layout, shape
        width, outliers = layout.books * sizes.padded, layout.outliers
        vectors = layout.centroids + layout.residual
        for name, size in zip(("indices", "second"), layout.index_bytes, strict=True):
            if size:
                check_buffer(buffers, name, (sizes.height, width), origin, _index_type(size))
        check_buffer(buffers, "codebooks", (layout.books, vectors, sizes.stride), origin)
        if outliers:
            check_buffer(buffers, "outliers", (sizes.height * layout.length, outliers), origin)
        for name in ("scale",) * bool(scheme.scales) + ("offset",) * scheme.offset:
            check_buffer(buffers, name, (1, columns), origin)
        books, device = buffers["codebooks"], buffers["codebooks"].device
        order = torch.arange(columns, device=device)
        if "column_order" in buffers:
            check_buffer(buffers, "column_order", (columns,), origin, torch.int64)
            if not torch.equal(buffers["column_order"].sort().values, order):
                raise ValueError(f"{origin}: no order of {columns} columns")
            order = buffers["column_order"]
        scale = buffers["scale"].flatten().float() if scheme.scales else None
        largest = books.float().abs().amax(-1)
        parts = largest.split([layout.centroids, layout.residual], 1)
        codes = Codes(
            indices=buffers["indices"],
            second=buffers.get("second"),
            codebooks=books,
            row_scale=None,
            order=sizes.spread(order[outliers:].int(), -1),
            multiplier=None if scale is None else sizes.spread(scale[outliers:], 0.0),
            rows=rows,
            height=sizes.height,
            width=width,
            blocks=width // BLOCK,
            book_steps=sizes.padded // STEP,
            factor=factor_of(sum(float(part.amax()) for part in parts if part.numel())),
            run_bytes=max(STEP * sum(layout.index_bytes) // layout.length, 1),
            constants={
                "BOOKS": 1,
                "MOST": layout.centroids - 1,
                "SECOND": layout.residual,
                "LENGTH": layout.length,
                "L": sizes.stride,
                "ROWS": 1,
                "TALL": True,
                "ONE_SCALE": False,
            },
        )
        apart = _Apart(
            inputs=order[:outliers] if outliers else None,
            multiplier=None if scale is None else scale[:outliers],
            offset=_by_inputs(buffers["offset"].flatten().float(), order) if scheme.offset else None,
        )
        return RowVectorsWeight(self, scheme, shape, buffers, origin, codes=codes, apart=apart)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        sizes, buffers = _sizes(packed.scheme, packed.shape), packed.buffers
        layout, parts = sizes.layout, []
        for name in ("indices", "second"):
            if name in buffers:
                indices = sizes.gathered(buffers[name]).contiguous().unsqueeze(-1)
                parts.append(indices.view(torch.uint8))
        codes = torch.cat(parts, -1).flatten(1)
        if layout.outliers:
            numbers = buffers["outliers"].unflatten(0, (-1, layout.length)).transpose(1, 2).flatten(1)
            codes = torch.cat((numbers.contiguous().view(torch.uint8), codes), 1)
        return QuantizedTensor(
            packed.scheme,
            packed.shape,
            codes,
            (buffers["scale"],) if packed.scheme.scales else (),
            offsets=(buffers["offset"],) if packed.scheme.offset else (),
            column_order=buffers.get("column_order"),
            origin=packed.origin,
            codebooks=buffers["codebooks"][..., : layout.length],
        )

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        assert isinstance(packed, RowVectorsWeight), "packed by this kernel"
        multiply(x, packed.codes, out, _more(x, packed))

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in); ids outside the weight are not told, as that would wait for the GPU."""
        sizes, buffers = _sizes(packed.scheme, packed.shape), packed.buffers
        layout, picked = sizes.layout, ids.long().clamp(0, packed.shape[0] - 1)
        vector, place = picked // layout.length, (picked % layout.length).unsqueeze(1)
        numbers, vectors = buffers["codebooks"].float().flatten(), layout.centroids + layout.residual
        book = torch.arange(layout.books, device=ids.device).repeat_interleave(sizes.width) * vectors

        def looked_up(name: str, first: int) -> Tensor:
            index = sizes.gathered(buffers[name].index_select(0, vector)).long() & 0xFFFF
            return numbers[(book + first + index) * sizes.stride + place]

        values = looked_up("indices", 0)
        if layout.residual:
            values += looked_up("second", layout.centroids)
        if layout.outliers:
            values = torch.cat((buffers["outliers"].index_select(0, picked).float(), values), 1)
        if packed.scheme.scales:
            values *= buffers["scale"].float()
        if packed.scheme.offset:
            values += buffers["offset"].float()
        order = buffers.get("column_order")
        return values if order is None else torch.empty_like(values).index_copy_(1, order, values)


@dataclass(frozen=True, eq=False)
class RowVectorsStack:
    """One weight of every expert: indices, codebooks, order and multiplier of ``codes`` are (experts, ...),
    and of ``apart`` all is. ``outliers``: (experts, rows of whole vectors, outliers), where there are any."""

    shape: tuple[int, int]
    codes: Codes
    apart: _Apart
    outliers: Tensor | None

    most_rows = 128
    gates = False  # an activation is a launch of its own

    @staticmethod
    def of(weights: Sequence[PackedWeight], buffers: dict[str, Tensor]) -> RowVectorsStack:
        """Around the stacked buffers."""
        known = [weight for weight in weights if isinstance(weight, RowVectorsWeight)]
        rows, columns = weights[0].shape

        def stacked(found: list[Tensor | None]) -> Tensor | None:
            there = [each for each in found if each is not None]
            return torch.stack(there) if there else None

        codes = replace(
            known[0].codes,
            indices=buffers["indices"],
            second=buffers.get("second"),
            codebooks=buffers["codebooks"],
            order=stacked([weight.codes.order for weight in known]),
            multiplier=stacked([weight.codes.multiplier for weight in known]),
            factor=min(weight.codes.factor for weight in known),  # of the largest numbers
        )
        parts = [weight.apart for weight in known]
        apart = _Apart(
            stacked([part.inputs for part in parts]),
            stacked([part.multiplier for part in parts]),
            stacked([part.offset for part in parts]),
        )
        return RowVectorsStack((rows, columns), codes, apart, buffers.get("outliers"))

    def multiply(self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, out: Tensor) -> None:
        """out (pairs, rows): row ``pair // divisor`` of x by the matrix of its expert.

        ``chosen``: int64 (pairs,), which ``sorted_`` has in order. Columns are not split: the experts are
        many.
        """
        codes, experts = self.codes, len(self.codes.codebooks)
        seen, scale = halves_of(x, codes.blocks, codes.order, codes.multiplier, chosen, divisor)
        own = codes.height * int(codes.constants["L"])
        if self.apart.offset is None and self.outliers is None:
            multiply_experts(seen, scale, codes, own, sorted_, out, 1, experts)
            return
        sums = torch.empty(out.shape, device=out.device)
        multiply_experts(seen, scale, codes, own, sorted_, sums, 1, experts)
        own_expert = chosen.clamp(0, experts - 1)
        if self.outliers is not None:
            sums.add_(self._of_outliers(x, divisor, own_expert, sorted_, self.outliers))
        if self.apart.offset is not None:
            # The same number for all rows of a pair.
            added = x.float() @ self.apart.offset.T  # (pairs / divisor, experts)
            sums.add_(added.gather(1, own_expert.view(len(x), divisor)).view(-1, 1))
        out.copy_(sums)

    def _of_outliers(
        self, x: Tensor, divisor: int, own_expert: Tensor, sorted_: SortedPairs, outliers: Tensor
    ) -> Tensor:
        """float32 (pairs, rows): a plain matrix of few columns, those of each expert, in a launch more."""
        from lowbit.kernels.gpu.expert_products import FLOAT_BLOCKS, Rows, Stack, multiply
        from lowbit.kernels.gpu.expert_rows import sort_pairs

        experts, height, count = outliers.shape
        assert self.apart.inputs is not None, "outliers have inputs"
        seen = (x if divisor == 1 else x.repeat_interleave(divisor, 0)).float()
        seen = seen.gather(1, self.apart.inputs.index_select(0, own_expert))
        if self.apart.multiplier is not None:
            seen *= self.apart.multiplier.index_select(0, own_expert)
        if sorted_.block_m not in FLOAT_BLOCKS:  # taller ones are those of 16-bit x
            sorted_ = sort_pairs(own_expert, experts, max(FLOAT_BLOCKS))
        found = torch.empty(len(seen), height, device=x.device)
        stack = Stack((height, count), None, {"matrix": outliers}, None, False)
        multiply(stack, Rows(seen, 1), sorted_, None, None, found)
        return found[:, : self.shape[0]]


def _sizes(scheme: Scheme, shape: tuple[int, ...]) -> _Sizes:
    layout = scheme.weight.vectors
    assert isinstance(layout, RowVectorLayout), "refuses() was asked first"
    return _Sizes(layout, shape[0], shape[1])


def _index_type(size: int) -> torch.dtype:
    return torch.uint8 if size == 1 else torch.int16


def _by_inputs(of: Tensor, order: Tensor) -> Tensor:
    """(in,) by stored columns -> by inputs."""
    return torch.empty_like(of).index_copy_(0, order, of)


def _more(x: Tensor, packed: RowVectorsWeight) -> Tensor | None:
    """float32 (tokens, rows), or (tokens, 1) where all rows have the same: outliers and offsets."""
    apart = packed.apart
    offset = None if apart.offset is None else (x.float() @ apart.offset).unsqueeze(1)
    if apart.inputs is None:
        return offset
    seen = x.index_select(1, apart.inputs).float()
    if apart.multiplier is not None:
        seen *= apart.multiplier
    product = seen @ packed.buffers["outliers"][: packed.shape[0]].float().T
    return product if offset is None else product.add_(offset)
