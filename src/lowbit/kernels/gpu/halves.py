"""gpu_halves: 3-bit codes of which float16 arithmetic makes weights, and outliers (SpQR), on NVIDIA GPUs.

Weights are float16's numbers, so x becomes float16 with a scale for each 128 columns (``half_inputs``), and
products are those of codebooks: on CUDA cores for one token, on tensor cores for more, with float32 sums
(``half_products``). Two roundings stand between a code and its weight, so that no sum of codes can take the
scale over: decoding costs a rounding and a product more a weight than in ``gpu_blocks``.

    y = W x + D x,  D = what the outliers add to W: each, and what rounding its sum with a weight changes

D is sparse and its product a launch of its own: rows' entries are read as they lie, and for several tokens
what they name of x lies together, token beside token, in a copy of x that is turned. Its sums are added as
those of a split. An outlier costs an instruction or three a token on CUDA cores where a weight costs a part
of a tensor core's: of many tokens 1 % of outliers are reckoned to take a third of the time. A mixture's
experts have these two launches together (``HalvesStack``).
**None of it has run on a GPU**: it is proven in Triton's interpreter, and compiled.

    buffers   plane2, plane1     uint8, codes as ``weight_layout`` has them, in runs of 64 columns
              scale0, zeros      float16 (out, in / 16)
              outlier_starts     int32 (out + 1,)
              outliers           int32 (outliers,), row by row: stored column, above it the float16 number
              outlier_rests      float16 (outliers,)
              column_order       int64 (in,), where there is one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.kernels.gpu import runtime, weight_layout
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
from lowbit.kernels.gpu.vectors import BLOCK, check_buffer, padded
from lowbit.kernels.gpu.weight_layout import Layout
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.kernels.gpu.expert_rows import SortedPairs

_RUN, _TILE = 64, 16  # columns
_RUN_BYTES = _RUN * 3 // 8 + _RUN // _TILE * 4
_ENTRY_BYTES = 6
_OUTLIERS = ("outlier_starts", "outliers", "outlier_rests")
_ALONE, _TOGETHER = (16, 64, 1), (8, 16, 16)  # rows, outliers of each and tokens that are summed at a time


@dataclass(frozen=True)
class HalvesWeight(PackedWeight):
    """A weight of ``GpuHalves``. ``order``: int32, as ``scaled_halves`` reads it."""

    order: Tensor | None = field(kw_only=True, repr=False)


class GpuHalves(GpuKernel):
    """See the module docstring."""

    name = "gpu_halves"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := unfit(replace(scheme, outliers=None), shape, device):
            return reason
        if scheme.outliers is None:
            return "no weight has an outlier"
        half = number_format("f16")
        codes = number_format("uint3")
        if replace(scheme, reordered=False) != Scheme(codes, ((1, _TILE),), (half,), "float", outliers=half):
            return "needs 3-bit codes, and f16 scales and zero points of 16 columns"
        return f"{shape[1]} columns are more than outliers can name" if shape[1] > 1 << 16 else None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of codes, scales, zero points and outliers."""
        count = round(scheme.outlier_share * shape[0] * shape[1])
        own = weight_layout.nbytes(replace(scheme, outliers=None), shape)
        return own + 4 * (shape[0] + 1) + _ENTRY_BYTES * count

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Codes in planes, outliers as they are."""
        outliers = weight.outliers
        assert outliers is not None, "its scheme has them"
        bare = replace(weight, scheme=replace(weight.scheme, outliers=None), outliers=None)
        own = {
            "outlier_starts": outliers.starts,
            "outliers": outliers.entries,
            "outlier_rests": _rests(weight, outliers),
        }
        there = {name: buffer.to(device, copy=True).contiguous() for name, buffer in own.items()}
        return self.restore(
            weight.scheme, weight.shape, weight_layout.pack(bare, device) | there, weight.origin
        )

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        (rows, columns), layout = shape, _layout(scheme, shape)
        if fault := weight_layout.fault(layout, buffers):
            raise ValueError(f"{origin}: {fault}")
        check_buffer(buffers, "outlier_starts", (rows + 1,), origin, torch.int32)
        starts = buffers["outlier_starts"]
        count = int(starts[-1])
        check_buffer(buffers, "outliers", (count,), origin, torch.int32)
        check_buffer(buffers, "outlier_rests", (count,), origin, torch.float16)
        if int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
            raise ValueError(f"{origin}: no outliers of {rows} rows")
        if count and int((buffers["outliers"] & 0xFFFF).max()) >= columns:
            raise ValueError(f"{origin}: an outlier outside {rows} x {columns}")
        order = buffers.get("column_order")
        blocks = -(-columns // BLOCK)
        return HalvesWeight(
            self,
            scheme,
            shape,
            buffers,
            origin,
            order=None if order is None else padded(order.int(), blocks * BLOCK, -1),
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        scheme, shape, buffers = packed.scheme, packed.shape, packed.buffers
        bare = replace(scheme, outliers=None)
        weight = weight_layout.unpack(_layout(scheme, shape), bare, shape, buffers, packed.origin)
        outliers = Outliers(buffers["outlier_starts"], buffers["outliers"])
        return replace(weight, scheme=scheme, outliers=outliers)

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        assert isinstance(packed, HalvesWeight), "packed by this kernel"
        _multiply(x, packed, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in); ids outside the weight are not told, as that would wait for the GPU."""
        out = torch.empty(len(ids), packed.shape[1], device=ids.device)
        if len(ids):
            _look_up(packed, ids.contiguous(), out)
        return out


@dataclass(frozen=True, eq=False)
class HalvesStack:
    """One weight of every expert: ``buffers`` are (experts, ...), but the outliers, which lie one expert's
    behind another's from ``first_entries``, int64 (experts,), on. ``order``: int32 (experts, padded in)."""

    shape: tuple[int, int]
    buffers: dict[str, Tensor]
    first_entries: Tensor
    order: Tensor | None

    most_rows = 128
    gates = False  # an activation is a launch of its own
    of_any_length = ("outliers", "outlier_rests")

    @staticmethod
    def of(weights: Sequence[PackedWeight], buffers: dict[str, Tensor]) -> HalvesStack:
        """Around the stacked buffers."""
        known = [weight for weight in weights if isinstance(weight, HalvesWeight)]
        counts = [len(weight.buffers["outliers"]) for weight in known]
        orders = [weight.order for weight in known if weight.order is not None]
        rows, columns = known[0].shape
        firsts = torch.tensor(list(accumulate(counts[:-1], initial=0)), device=buffers["plane2"].device)
        return HalvesStack((rows, columns), buffers, firsts, torch.stack(orders) if orders else None)

    def multiply(self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, out: Tensor) -> None:
        """out (pairs, rows): row ``pair // divisor`` of x by the matrix of its expert.

        ``chosen``: int64 (pairs,), which ``sorted_`` has in order. Columns are not split: the experts are
        many. Outliers' sums are added to the product's.
        """
        (rows, columns), pairs = self.shape, len(out)
        blocks, runs = -(-columns // BLOCK), -(-columns // _RUN)
        given = (None, 1) if self.order is None else (chosen, divisor)  # else a row of x is every expert's
        seen, scale = halves_of(x, blocks, self.order, None, *given)
        outliers = len(self.buffers["outliers"]) > 0
        parts = torch.empty(1 + outliers, pairs, rows, device=x.device) if outliers else out
        own, cut = expert_blocks(sorted_, rows, runs, x.device)
        same = divisor if self.order is None else 1
        _tiles(seen, scale, (rows, columns), _codes(self.buffers), parts, pairs, own, cut, sorted_, same)
        if outliers:
            self._multiply_outliers(x, divisor, chosen, sorted_, parts[-1])
            add(parts, out)

    def _multiply_outliers(
        self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, out: Tensor
    ) -> None:
        """out: float32 (pairs, rows). Few pairs are taken by themselves: most blocks would hold one."""
        from lowbit.kernels.gpu.half_products import outlier_sums

        (rows, columns), experts = self.shape, len(self.first_entries)
        few = len(chosen) <= 2 * experts
        height, entries, together = _ALONE if few else _TOGETHER
        places = len(chosen) if few else len(sorted_.rows) // together
        runtime.launch(
            outlier_sums,
            (-(-rows // height), places),
            *(x.T.contiguous(), out, self.buffers.get("column_order")),
            *(self.buffers[name] for name in _OUTLIERS),
            self.first_entries,
            *((None, chosen) if few else (sorted_.rows, sorted_.experts)),
            *(len(chosen), len(x), rows, columns, experts),
            SAME=divisor,
            BM=1 if few else sorted_.block_m,
            R=height,
            K=entries,
            M=together,
        )


def _layout(scheme: Scheme, shape: tuple[int, ...]) -> Layout:
    layout = weight_layout.layout_of(replace(scheme, outliers=None), shape)
    assert isinstance(layout, Layout) and layout.tile == _TILE, "refuses() was asked first"
    return layout


def _codes(buffers: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(buffers[name] for name in ("plane2", "plane1", "zeros", "scale0"))


def _rests(weight: QuantizedTensor, outliers: Outliers) -> Tensor:
    """float16 (count,): what the sum of each outlier and its weight changes by when it is rounded."""
    rows, columns = outliers.rows, outliers.columns
    assert weight.zeros is not None, "its scheme has zero points"
    code = weight.codes[rows, columns].float()
    zero, scale = (of[rows, columns // _TILE].float() for of in (weight.zeros, weight.scales[0]))
    exact = ((code - zero).half().float() * scale).half().double()
    exact += outliers.values(number_format("f16")).double()
    return (exact.float().half().double() - exact).half()


def _multiply(x: Tensor, packed: HalvesWeight, out: Tensor) -> None:
    from lowbit.kernels.gpu.half_products import half_vector

    (tokens, columns), rows = x.shape, packed.shape[0]
    blocks, runs = -(-columns // BLOCK), -(-columns // _RUN)
    seen, scale = halves_of(x, blocks, packed.order)
    shape = Shape(rows, runs, _RUN_BYTES, _RUN, SPLIT_COLUMNS // _RUN)
    chosen, one = half_blocks(shape, tokens, x.device)
    outliers = len(packed.buffers["outliers"]) > 0
    splits = one.splits + outliers
    parts = out if splits == 1 else torch.empty(splits, tokens, rows, device=x.device)
    if outliers:
        _multiply_outliers(x, packed, parts[-1])
    if tokens == 1:
        runtime.launch(
            half_vector,
            (-(-rows // one.height), one.splits),
            *(seen, scale, parts, *_codes(packed.buffers)),
            *(rows, columns, runs, one.each),
            num_warps=chosen.num_warps,
            BN=one.height,
            STAGES=chosen.num_stages,
        )
    else:
        _tiles(seen, scale, (rows, columns), _codes(packed.buffers), parts, tokens, chosen, one)
    if splits > 1:
        add(parts, out)


def _tiles(
    seen: Tensor,
    scale: Tensor,
    shape: tuple[int, int],
    codes: tuple[Tensor, ...],
    parts: Tensor,
    tokens: int,
    chosen: Blocks,
    one: Cut,
    sorted_: SortedPairs | None = None,
    same: int = 1,
) -> None:
    """Products into ``parts`` (..., tokens, rows); ``same`` pairs of experts have one row of x, and ``codes``
    are then (experts, ...)."""
    from lowbit.kernels.gpu.half_products import half_tile

    rows, columns = shape
    token_blocks = -(-tokens // chosen.BM) if sorted_ is None else sorted_.blocks
    low, middle, zeros, _ = (codes[i][0] if sorted_ is not None else codes[i] for i in range(4))
    runtime.launch(
        half_tile,
        (token_blocks * -(-rows // one.height), one.splits),
        *(seen, scale, parts, *codes),
        *((None, None) if sorted_ is None else (sorted_.rows, sorted_.experts)),
        *(tokens, token_blocks, rows, columns, -(-columns // BLOCK), parts.stride(-2)),
        *(-(-columns // _RUN), one.each, low.numel(), middle.numel(), zeros.numel()),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        SAME=same,
        BM=chosen.BM,
        BN=one.height,
    )


def _multiply_outliers(x: Tensor, packed: PackedWeight, out: Tensor) -> None:
    """out: float32 (tokens, rows)."""
    from lowbit.kernels.gpu.half_products import outlier_sums

    tokens, (rows, columns) = len(x), packed.shape
    height, entries, together = _ALONE if tokens == 1 else _TOGETHER
    runtime.launch(
        outlier_sums,
        (-(-rows // height), -(-tokens // together)),
        *(x.T.contiguous(), out, packed.buffers.get("column_order")),
        *(packed.buffers[name] for name in _OUTLIERS),
        *(None, None, None),
        *(tokens, tokens, rows, columns, 0),
        SAME=1,
        BM=1,
        R=height,
        K=entries,
        M=together,
    )


def _look_up(packed: PackedWeight, ids: Tensor, out: Tensor) -> None:
    from lowbit.kernels.gpu.half_products import half_rows, outlier_rows

    (rows, columns), buffers = packed.shape, packed.buffers
    order = buffers.get("column_order")
    runtime.launch(
        half_rows,
        (-(-len(ids) // _TILE), -(-columns // _RUN)),
        *(out, ids, order, *_codes(buffers)),
        *(len(ids), rows, columns),
        BN=_TILE,
    )
    if len(buffers["outliers"]):
        runtime.launch(
            outlier_rows,
            (len(ids),),
            *(out, ids, order, buffers["outlier_starts"], buffers["outliers"], rows, columns),
            K=128,
        )
