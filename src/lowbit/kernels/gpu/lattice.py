"""gpu_lattice: vectors of the lattice E8 (QuIP#) on NVIDIA GPUs as files hold them, 2 to 4 bits a weight.

    y = outputs * (H_out (u (H_in^T (inputs * x))))

The transforms are ``Rotator``'s, float32: in Triton where an order is a power of two, in torch where it has
a head. u is made by the launches of ``gpu_vectors``: a codebook has all 65,536 vectors in float16, which
holds those of one code exactly, and of second codes the vectors over their divisor, rounded to it. One such
table serves all weights of a device, 1 MiB a book that stays in the L2 cache. Rows are not looked up here.
Ranks have some of u's rows each, and no ``outputs``: they gather their products before the second transform.
**None of it has run on a GPU**: it is proven in Triton's interpreter, and compiled.

    buffers   indices   int16 (books of 16 bits, out, in / 8)
              second    uint8 (out, in / 8), where second codes have 8 bits
              outputs   float32 (out, 1), where y is transformed
              inputs    float32 (1, in)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
from lowbit.kernels.linear_kernel import PackedWeight, Use
from lowbit.kernels.rotation import Rotator
from lowbit.numerics.hadamard import hadamard_factors
from lowbit.numerics.lattice import LENGTH, LatticeLayout, e8, e8p, transform
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.kernels.gpu.expert_rows import SortedPairs

_SCALES = ("inputs", "outputs")


@dataclass(frozen=True)
class LatticeWeight(PackedWeight):
    """A weight of ``GpuLattice``."""

    codes: Codes = field(kw_only=True, repr=False)
    before: Rotator = field(kw_only=True, repr=False)
    after: Rotator | None = field(kw_only=True, repr=False)


class GpuLattice(GpuKernel):
    """See the module docstring."""

    name = "gpu_lattice"
    looks_up = False

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := unfit(scheme, shape, device):
            return reason
        if scheme.weight.lattice is None:
            return "weights are no vectors of a lattice"
        single = number_format("f32")
        shared = scheme == Scheme(scheme.weight, ((0, 1),), (single,))
        if not shared and scheme != Scheme(scheme.weight, ((1, 0), (0, 1)), (single, single)):
            return "needs a float32 scale for each row and each column, and nothing that is added"
        if shape[1] % LENGTH:
            return f"{shape[1]} columns are no whole vectors of {LENGTH}"
        for size in shape[shared:]:
            if hadamard_factors(size) is None:
                return f"there is no Hadamard matrix of order {size}"
        return None

    def unfit(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device, use: Use) -> str | None:
        """Lookups."""
        return "a row is made of all rows' codes" if use.lookup else None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of codes and scales."""
        return shape[0] * shape[1] * _layout(scheme).bits // 8 + 4 * sum(
            shape if len(scheme.scales) == 2 else shape[1:]
        )

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same codes, the second ones behind the first."""
        layout = _layout(weight.scheme)
        words, wide = layout.words(weight.codes), _wide_books(layout)
        buffers = {"indices": torch.stack(words[:wide]).to(torch.int16).to(device)}
        for name, scale in zip(_SCALES, weight.scales[::-1], strict=False):
            buffers[name] = scale.to(device, copy=True).contiguous()
        for narrow in words[wide:]:
            buffers["second"] = narrow.to(torch.uint8).to(device)
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        layout, (rows, columns) = _layout(scheme), shape
        wide, vectors = _wide_books(layout), columns // LENGTH
        check_buffer(buffers, "indices", (wide, rows, vectors), origin, torch.int16)
        if wide < layout.books:
            check_buffer(buffers, "second", (rows, vectors), origin, torch.uint8)
        check_buffer(buffers, "inputs", (1, columns), origin, torch.float32)
        after = None
        if len(scheme.scales) == 2:
            check_buffer(buffers, "outputs", (rows, 1), origin, torch.float32)
            after = transform(rows, after=buffers["outputs"].flatten())
        device = buffers["indices"].device
        codes = Codes(
            indices=buffers["indices"],
            second=buffers.get("second"),
            codebooks=_codebooks(layout, device),
            row_scale=None,
            order=None,
            multiplier=None,
            rows=rows,
            height=rows,
            width=vectors,
            blocks=-(-columns // BLOCK),
            book_steps=1,
            factor=factor_of(2 * float(e8p().abs().max())),
            run_bytes=STEP * layout.bits // 8,
            constants={
                "BOOKS": wide,
                "MOST": 65535,
                "SECOND": 256 if wide < layout.books else 0,
                "LENGTH": LENGTH,
                "L": LENGTH,
                "ROWS": 1,
                "TALL": False,
                "ONE_SCALE": False,
            },
        )
        before = transform(columns, before=buffers["inputs"].flatten())
        return LatticeWeight(
            self,
            scheme,
            shape,
            buffers,
            origin,
            codes=codes,
            before=Rotator(before.to(device)),
            after=None if after is None else Rotator(after.to(device)),
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        words = [book.int() & 0xFFFF for book in packed.buffers["indices"]]
        if "second" in packed.buffers:
            words.append(packed.buffers["second"].int())
        scales = tuple(packed.buffers[name] for name in _SCALES[: len(packed.scheme.scales)][::-1])
        codes = _layout(packed.scheme).codes(words)
        return QuantizedTensor(packed.scheme, packed.shape, codes, scales, origin=packed.origin)

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        assert isinstance(packed, LatticeWeight), "packed by this kernel"
        turned = packed.before.rotated(x, torch.float32)
        sums = torch.empty(out.shape, device=x.device)
        multiply(turned, packed.codes, sums)
        if packed.after is not None:
            packed.after.in_place(sums)
        out.copy_(sums)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """Never: ``looks_up`` says so."""
        raise NotImplementedError(f"{packed.origin}: {self.name} looks up no rows")


@dataclass(frozen=True, eq=False)
class LatticeStack:
    """One weight of every expert: the indices of ``codes`` are (experts, ...), ``inputs`` float32
    (experts, in), ``outputs`` (experts, out). All have one codebook, and one transform but for these scales.
    """

    shape: tuple[int, int]
    codes: Codes
    inputs: Tensor
    outputs: Tensor
    before: Rotator
    after: Rotator

    most_rows = 128
    gates = False  # an activation is a launch of its own

    @staticmethod
    def of(weights: Sequence[PackedWeight], buffers: dict[str, Tensor]) -> LatticeStack:
        """Around the stacked buffers."""
        first, (rows, columns) = weights[0], weights[0].shape
        assert isinstance(first, LatticeWeight), "packed by this kernel"
        codes = replace(first.codes, indices=buffers["indices"], second=buffers.get("second"))
        device = codes.indices.device
        return LatticeStack(
            (rows, columns),
            codes,
            buffers["inputs"].flatten(1),
            buffers["outputs"].flatten(1),
            Rotator(transform(columns, before=torch.ones(columns)).to(device)),
            Rotator(transform(rows).to(device)),
        )

    def multiply(self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, out: Tensor) -> None:
        """out (pairs, rows): row ``pair // divisor`` of x by the matrix of its expert.

        ``chosen``: int64 (pairs,), which ``sorted_`` has in order. Columns are not split: the experts are
        many.
        """
        own = chosen.clamp(0, len(self.inputs) - 1)
        x = x if divisor == 1 else x.repeat_interleave(divisor, 0)
        turned = self.before.rotated(x.float() * self.inputs.index_select(0, own), torch.float32)
        seen, scale = halves_of(turned, self.codes.blocks)
        sums = torch.empty(out.shape, device=out.device)
        multiply_experts(seen, scale, self.codes, self.shape[0], sorted_, sums)
        self.after.in_place(sums)
        out.copy_(sums.mul_(self.outputs.index_select(0, own)))


def _layout(scheme: Scheme) -> LatticeLayout:
    layout = scheme.weight.lattice
    assert layout is not None, "refuses() was asked first"
    return layout


def _wide_books(layout: LatticeLayout) -> int:
    """Of codes of 16 bits."""
    return 1 if layout.second == 8 else layout.books


@cache
def _codebooks(layout: LatticeLayout, device: torch.device) -> Tensor:
    """float16 (vectors of all books, 8)."""
    books = [e8p()]
    if layout.divisor:
        books.append((e8() if layout.second == 8 else e8p()) / layout.divisor)
    return torch.cat(books).to(device).half()
