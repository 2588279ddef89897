"""gpu_columns: scales of one column of several rows (HQQ's axis 0, SINQ) on NVIDIA GPUs.

Codes are those of ``gpu_blocks``, in the weight's own order. A program has rows of one group, wherever they
lie, and multiplies x by the group's columns' scales before codes meet it (``column_products``): for one token
in float32, nothing is rounded; for more in float16 beside a scale for each token and 128 columns
(``half_inputs``) and one for the group, 2^-12 of each product of x and a scale. Tables (nf4) are rounded to
float16 then. Groups of fewer rows than a program has would leave the tensor cores' tiles empty, of 16 rows
those of one warp; it is the number of rows, not the bytes, that small groups cost. **None of it has run on a
GPU**: it is proven in Triton's interpreter, and compiled.

    buffers   plane4 … zeros   those of ``gpu_blocks``; scales of 1 where codes have none of their own
              column_scale     (groups, in), as stored
              column_zero      alike, where the columns' level has zero points
              row_groups       int32 (out,), of scattered rows
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import column_rules
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.gpu_kernel import (
    SPLIT_COLUMNS,
    GpuKernel,
    add,
    half_blocks,
    halves_of,
    unfit,
)
from lowbit.kernels.gpu.linear import GpuBlocks, GpuWeight
from lowbit.kernels.gpu.programs import Shape
from lowbit.kernels.gpu.vectors import BLOCK, check_buffer
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_BLOCKS = GpuBlocks()
_UNITS = (64, 32, 16)  # rows of a program, at most
_MOST_FILLING = 1.25  # rows of all units to the weight's, beyond which smaller ones are tried


@dataclass(frozen=True)
class _Groups:
    """Which rows programs have."""

    unit: int
    rows: Tensor  # int32 (units * unit,): -1 where a group's last unit is filled up
    of_units: Tensor  # int32 (units,): the group of each
    of_rows: Tensor  # int64 (out,): the group of each
    factors: Tensor  # float32 (groups,): powers of two that scales are divided by

    @staticmethod
    def of(scheme: Scheme, rows: int, scale: Tensor, row_groups: Tensor | None) -> _Groups:
        """ValueError where they cannot be."""
        row_groups = None if row_groups is None else row_groups.cpu()
        counts, order = column_rules.rows_of_groups(scheme, rows, len(scale), row_groups)
        order = torch.arange(rows) if order is None else order
        of_units: Tensor
        for unit in _UNITS:
            of_units = torch.arange(len(counts)).repeat_interleave((counts + unit - 1) // unit)
            if len(of_units) * unit <= _MOST_FILLING * rows:
                break
        groups = torch.arange(len(counts)).repeat_interleave(counts)
        first_unit = torch.searchsorted(of_units, torch.arange(len(counts)))
        first_row = counts.cumsum(0) - counts
        listed = torch.full((len(of_units) * unit,), -1, dtype=torch.int32)
        listed[torch.arange(rows) + (first_unit * unit - first_row)[groups]] = order.int()
        largest = scale.float().abs().amax(1)
        exponents = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent
        device = scale.device
        return _Groups(
            unit,
            listed.to(device),
            of_units.int().to(device),
            torch.empty_like(groups).scatter_(0, order, groups).to(device),
            torch.ldexp(torch.ones_like(largest), exponents.clamp(-100, 100)),
        )


@dataclass(frozen=True)
class ColumnsWeight(PackedWeight):
    """A weight of ``GpuColumns``, with the codes as ``gpu_blocks`` has them."""

    codes: GpuWeight = field(kw_only=True, repr=False)
    groups: _Groups = field(kw_only=True, repr=False)

    @property
    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """The columns' scales and zero points."""
        return self.buffers["column_scale"], self.buffers.get("column_zero")


class GpuColumns(GpuKernel):
    """See the module docstring."""

    name = "gpu_columns"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := unfit(scheme, shape, device):
            return reason
        inner = column_rules.inner(scheme)
        return inner if isinstance(inner, str) else _BLOCKS.refuses(inner, shape, device)

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the codes and their scales, and of the columns' scales and zero points."""
        groups = -(-shape[0] // (scheme.blocks[-1][0] or shape[0]))
        numbers = groups * shape[1] * (1 + column_rules.has_zeros(scheme))
        return _BLOCKS.nbytes(_inner(scheme), shape) + numbers * int(scheme.scales[-1].bits) // 8

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Codes as ``gpu_blocks`` has them, the columns' numbers beside them."""
        own = column_rules.numbers(weight).items()
        buffers = {name: buffer.to(device, copy=True).contiguous() for name, buffer in own}
        buffers |= _BLOCKS.pack(column_rules.inner_weight(weight), device).buffers
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        scale, dtype = buffers.get("column_scale"), scheme.scales[-1].dtype
        size = (0 if scale is None else len(scale), shape[1])
        for name in ("column_scale",) + ("column_zero",) * column_rules.has_zeros(scheme):
            check_buffer(buffers, name, size, origin, dtype)
        assert scale is not None, "it was looked for"
        codes = _BLOCKS.restore(_inner(scheme), shape, buffers, origin)
        assert isinstance(codes, GpuWeight), "gpu_blocks packs such"
        try:
            groups = _Groups.of(scheme, shape[0], scale, buffers.get("row_groups"))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        return ColumnsWeight(self, scheme, shape, buffers, origin, codes=codes, groups=groups)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        assert isinstance(packed, ColumnsWeight), "packed by this kernel"
        return column_rules.outer_weight(_BLOCKS.unpack(packed.codes), packed.scheme, packed.buffers)

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        assert isinstance(packed, ColumnsWeight), "packed by this kernel"
        _multiply(x, packed, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in); ids outside the weight are not told, as that would wait for the GPU."""
        assert isinstance(packed, ColumnsWeight), "packed by this kernel"
        found, (scale, zero) = _BLOCKS.rows(packed.codes, ids), packed.numbers
        group = packed.groups.of_rows[ids.long().clamp(0, packed.shape[0] - 1)]
        if zero is not None:
            found -= zero[group].float()
        return found * scale[group].float()


def _inner(scheme: Scheme) -> Scheme:
    inner = column_rules.inner(scheme)
    assert not isinstance(inner, str), "refuses() was asked first"
    return inner


def _multiply(x: Tensor, packed: ColumnsWeight, out: Tensor) -> None:
    from lowbit.kernels.gpu.column_products import column_tile, column_vector

    (tokens, columns), rows, groups = x.shape, packed.shape[0], packed.groups
    layout, codes = packed.codes.layout, (*packed.numbers, *packed.codes.pointers)
    run = layout.tile * layout.fields
    shape = Shape(len(groups.rows), layout.runs, run * layout.bits // 8, run, max(SPLIT_COLUMNS // run, 1))
    chosen, one = half_blocks(shape, tokens, x.device, groups.unit)
    parts = out if one.splits == 1 else torch.empty(one.splits, tokens, rows, device=x.device)
    programs = len(groups.rows) // one.height
    constants: dict[str, Any] = dict(packed.codes.constants) | {
        "INNER": len(packed.scheme.blocks) > 1,
        "UNIT": groups.unit,
        "BN": one.height,
    }
    if tokens == 1:
        runtime.launch(
            column_vector,
            (programs, one.splits),
            *(x, parts, groups.rows, groups.of_units, *codes, rows, columns, layout.runs, one.each),
            num_warps=chosen.num_warps,
            STAGES=chosen.num_stages,
            **constants,
        )
    else:
        blocks = -(-columns // BLOCK)
        seen, scale = halves_of(x, blocks)
        runtime.launch(
            column_tile,
            (programs * -(-tokens // chosen.BM), one.splits),
            *(seen, scale, parts, groups.rows, groups.of_units, *codes[:2], groups.factors, *codes[2:]),
            *(tokens, rows, columns, blocks, parts.stride(-2), layout.runs, one.each),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            BM=chosen.BM,
            **constants,
        )
    if one.splits > 1:
        add(parts, out)
