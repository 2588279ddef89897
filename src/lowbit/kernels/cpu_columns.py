"""cpu_columns: weights whose scale belongs to one column of several rows, packed as they are.

HQQ's axis 0 (a scale and a zero point for a column, or for so many rows of it, which may lie apart) and
SINQ's tiles (such a scale above one for a group of the row). The rows that share their columns' scales are a
*group*. q code, z zero point, s scale of a column, r a row of the group:

    sum over c of (q[r, c] - z[c]) s[c] x[c] = sum of q[r, c] X[c] - sum of z[c] X[c],  X[c] = s[c] x[c]

A group's rows lie together, filled up to whole blocks of 16, and for each group x is multiplied by its scales
before it meets codes that have none (SINQ: those of their groups). X is rounded as any kernel here rounds its
input (bfloat16; whole numbers of 16 bits where processors have none): x itself is not, so that it is rounded
once. The second sum is float32 and the same for all rows of a group. Codes are cpu_blocks', in its layout.
Prompts' tokens meet weights, scales of columns in them, as they do everywhere (prompt_rows).

    buffers   data, table          cpu_blocks', of the rows group by group
              column_scale         (groups, columns of whole tiles), as stored; zeros behind the last column
              column_zero          alike, where the column's level has zero points
              row_groups           int32 (out,), of scattered rows

Bytes are the scheme's, but that rows of a group are filled up: 16 and more cost nothing, 8 twice their codes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import column_rules, packed_linear
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import COLUMNS, ROWS, SCALE_KINDS, NativeWeight
from lowbit.kernels.prompt_rows import first_prompt_row
from lowbit.kernels.step_plan import Operation, native_operation, no_memory
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_BLOCKS = CpuBlocks()
_LARGEST_GROWTH = 2.0  # packed bytes to the scheme's own; what is refused runs many times slower


class _Description(ctypes.Structure):
    """lowbit_column_weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("first_row", "first_block", "places")),
        *((name, ctypes.c_int64) for name in ("groups", "columns")),
        *((name, ctypes.c_int32) for name in ("kind", "most_blocks")),
    )


@cache
def _operation() -> Operation | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, number, number, pointer, number, number)
    return native_operation("linear_columns", arguments, no_memory("for a product's input"))


@dataclass(frozen=True)
class _Rows:
    """Which rows make up each group, and where they are packed."""

    first_row: Tensor  # int32 (groups + 1,): in ``order``
    first_block: Tensor  # int32 (groups + 1,)
    order: Tensor | None  # int32 (out,): rows group by group, None: as they are

    @staticmethod
    def of(scheme: Scheme, rows: int, groups: int, row_groups: Tensor | None) -> _Rows:
        """ValueError where they cannot be."""
        counts, order = column_rules.rows_of_groups(scheme, rows, groups, row_groups)
        order = None if order is None else order.to(torch.int32)
        return _Rows(_ends(counts), _ends((counts + ROWS - 1) // ROWS), order)

    @property
    def _starts(self) -> Tensor:
        """int64 (rows,): what is added to a row's place in ``order`` to have its packed one."""
        counts = self.first_row.diff()
        return (self.first_block[:-1] * ROWS - self.first_row[:-1]).repeat_interleave(counts).long()

    @property
    def packed(self) -> Tensor:
        """int64 (packed rows,): the row packed there; a group's last again where it is filled up."""
        blocks = self.first_block.diff()
        firsts = (self.first_row[:-1] - self.first_block[:-1] * ROWS).repeat_interleave(blocks * ROWS)
        lasts = (self.first_row[1:] - 1).repeat_interleave(blocks * ROWS)
        places = torch.minimum(torch.arange(len(lasts)) + firsts, lasts)
        return places if self.order is None else self.order[places].long()

    @property
    def places(self) -> Tensor:
        """int64 (rows,): where each row is packed."""
        there = torch.arange(len(self._starts)) + self._starts
        return there if self.order is None else torch.empty_like(there).scatter_(0, self.order.long(), there)


def _ends(counts: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).to(torch.int32)


@dataclass(frozen=True)
class ColumnsWeight(PackedWeight):
    """A PackedWeight with the codes as cpu_blocks has them, and what the native code reads."""

    codes: NativeWeight = field(kw_only=True, repr=False)
    rows: _Rows = field(kw_only=True, repr=False)
    description: _Description = field(kw_only=True, repr=False)


def _packed_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the packed codes, where groups are full."""
    rows, height = shape[0], scheme.blocks[-1][0] or shape[0]
    full, rest = divmod(rows, height)
    return full * (-(-height // ROWS) * ROWS) + -(-rest // ROWS) * ROWS, shape[1]


class CpuColumns(NativeKernel):
    """See the module docstring."""

    name = "cpu_columns"
    layout = 1

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the scheme cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        inner = column_rules.inner(scheme)
        if isinstance(inner, str):
            return inner
        if reason := _BLOCKS.refuses(inner, _packed_shape(scheme, shape), device):
            return reason
        # Judged as a weight of whole tiles, as cpu_blocks is.
        height = scheme.blocks[-1][0] or -(-shape[0] // ROWS) * ROWS
        tall = (-(-shape[0] // height) * height, -(-shape[1] // COLUMNS) * COLUMNS)
        own, packed = scheme.bits_per_weight(tall) * tall[0] * tall[1] / 8, self.nbytes(scheme, tall)
        if packed > _LARGEST_GROWTH * own:
            return f"would take {packed} bytes, the scheme's own are {own:.0f}"
        return None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the tiles, and of the columns' scales and zero points."""
        inner = column_rules.inner(scheme)
        assert not isinstance(inner, str), "refuses() was asked first"
        groups = -(-shape[0] // (scheme.blocks[-1][0] or shape[0]))
        numbers = groups * -(-shape[1] // COLUMNS) * COLUMNS * (1 + column_rules.has_zeros(scheme))
        return (
            _BLOCKS.nbytes(inner, _packed_shape(scheme, shape)) + numbers * int(scheme.scales[-1].bits) // 8
        )

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Rows group by group, codes in cpu_blocks' layout, the columns' numbers beside them."""
        scheme, numbers = weight.scheme, column_rules.numbers(weight)
        rows = _Rows.of(scheme, weight.shape[0], len(numbers["column_scale"]), weight.row_groups)
        packed = _BLOCKS.pack(column_rules.inner_weight(weight).permute_rows(rows.packed), device)
        assert isinstance(packed, NativeWeight), "cpu_blocks packs such"
        padding = (0, packed.description.columns - weight.shape[1])
        for name in {"column_scale", "column_zero"} & numbers.keys():
            numbers[name] = torch.nn.functional.pad(numbers[name], padding)
        buffers = {name: buffer.contiguous() for name, buffer in (packed.buffers | numbers).items()}
        return self.restore(scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        inner = column_rules.inner(scheme)
        if isinstance(inner, str):
            raise ValueError(f"{origin}: {inner}")
        names = ("column_scale",) + ("column_zero",) * column_rules.has_zeros(scheme)
        numbers = [buffers[name] for name in names]
        try:
            rows = _Rows.of(scheme, shape[0], len(numbers[0]), buffers.get("row_groups"))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        packed_shape = (int(rows.first_block[-1]) * ROWS, shape[1])
        codes = _BLOCKS.restore(inner, packed_shape, buffers, origin)
        assert isinstance(codes, NativeWeight), "cpu_blocks packs such"
        groups, dtype = len(rows.first_row) - 1, scheme.scales[-1].dtype
        assert dtype is not None, "columns' scales are floats"
        wanted = dict.fromkeys(names, ((groups, codes.description.columns), dtype))
        packed_linear.check_buffers(buffers, wanted, origin)
        described = _Description(
            codes.address,
            *(numbers[i].data_ptr() if i < len(numbers) else None for i in range(2)),
            rows.first_row.data_ptr(),
            rows.first_block.data_ptr(),
            None if rows.order is None else rows.order.data_ptr(),
            groups,
            shape[1],
            SCALE_KINDS[scheme.scales[-1].name],
            int(rows.first_block.diff().max()),
        )
        return ColumnsWeight(
            self, scheme, shape, buffers, origin, codes=codes, rows=rows, description=described
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        assert isinstance(packed, ColumnsWeight), "packed by this kernel"
        codes = _BLOCKS.unpack(packed.codes).permute_rows(packed.rows.places)
        return column_rules.outer_weight(codes, packed.scheme, packed.buffers)

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        assert isinstance(packed, ColumnsWeight), "packed by this kernel"
        x, out = packed_linear.operands(x, packed, out)
        run = _operation()
        assert run is not None, "packed by a native kernel"
        run(
            ctypes.addressof(packed.description),
            x.data_ptr(),
            len(x),
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            first_prompt_row(len(x)),
        )
        return out

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        assert isinstance(packed, ColumnsWeight), "packed by this kernel"
        places = packed.rows.places[packed_linear.check_rows(ids, packed)]
        found = packed_linear.rows(packed.codes, places)
        group = torch.searchsorted(packed.rows.first_block.long() * ROWS, places, right=True) - 1
        columns = packed.shape[1]
        if "column_zero" in packed.buffers:
            found -= packed.buffers["column_zero"][group, :columns].float()
        return found * packed.buffers["column_scale"][group, :columns].float()
