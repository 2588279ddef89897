"""gpu_blocks and gpu_dense: linear layers on NVIDIA GPUs.

gpu_blocks takes codes of 1 to 8 bits in the layout of ``weight_layout``, all formats but those that file
refuses, and x of any float type, with float32 sums:

    1 token        ``word_product``, or ``vector_product`` of e5m2, e2m3 and the like: CUDA cores,
                   float32 products, weights never rounded
    2 to 128       ``tile_product``, exact: tensor cores multiply codes less zero points, which x's type
                   holds; scales meet the float32 sums of their columns. Tables (nf4) are rounded
    129 to 511     ``tile_product``: tiles of weights are dequantized and rounded to x's type
    from 512       slices of rows are dequantized into a workspace that cuBLAS multiplies

float32 x is multiplied as float32 all the way, on CUDA cores. Columns in another order (act-order) are
gathered from x first. A row's last bit may depend on how many rows are beside it, by the table above.

Why these blocks, where none were measured for the GPU (``tuned_sizes``); none of it has been timed. One token
of a 4-bit weight of 4096 x 4096 reads 8 MiB, 2.5 us of an H100's 3.35 TB/s (1.75 us of an H200's 4.8), and
latency times bandwidth asks for some 25 KiB under way on each of 132 SMs (15 on an A100's 108).
A program of 128 rows loads 8 KiB a step, with 4 steps in flight and several programs on each SM. Lower ones
are there for weights whose rows make too few, or as many that some SMs have one more than others; a thread
uses its part of x for fewer rows then. Instructions a weight as assembled for Hopper, 128 rows (256 where
groups have 32 columns or less): 4 bits in groups of 128 3.2, of 32 3.8, 8 bits with a scale a row 3.9, 3
bits 5.4, Q6_K 6.7, nf4 5.1, MXFP4 5.6, e4m3 5.5 (bytes decoded one by one: 7.3, 8.1, 7.5, 12.3, 14, 7.3,
8.2 and 12.1), where an H200 has 3.3 to 3.7 in the time that memory brings 4 bits, an H100 4.7 to 5.3, and
in proportion for others. A token more costs one more: from the second on tensor cores, on which tokens are
free (a tile has 16, rows of none are not read). That holds for 2 to 8 tokens as for 16: what they need is
what one token needs, bytes under way and equal work for all SMs, and ``programs`` cuts both alike.
Their tiles are 128 or 64 rows high (less, and two warps would decode the same rows), as every block of rows
reads all of x again from L2: with 16 tokens x is half of what a block of 128 reads, with 64 two thirds.
Columns are split at 512 a program or more, as a program should have several loads in flight; the splits' sums
are added in their order by whichever program comes last, not by atomics, so that equal calls give equal bits.

Between 129 and 511 tokens a tile is decoded once for 128 tokens, and rounded with its scales: sums of a
group apart from all sums would need twice the registers. (With 65 to 128 tokens that takes 7.5 instructions
a weight, and 4.9 with scales behind the sums: 8.4 and 7.3 in groups of 32; Q4_K 11.7 and 12.7.) From 512 on
decoding in every block of tokens costs more than writing and reading 2 bytes a weight once. A slice has 32
MiB, which stay in L2 (40 MiB on an A100, 50 on an H100), or as many rows as give each SM a tile of 128
tokens and 256 rows: few tokens and wide rows would leave most of them without work. From HBM a workspace is
1.2 ps a weight, beside the 8.2 that 4096 tokens' products take at a PFLOP a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels.gpu import runtime, tuned_sizes, weight_layout
from lowbit.kernels.gpu.gpu_kernel import (
    SPLIT_COLUMNS,
    GpuKernel,
    Split,
    checked,
    multiprocessors,
    output,
    unfit,
)
from lowbit.kernels.gpu.programs import Cut, Shape, Tokens, cut, cuts
from lowbit.kernels.gpu.tuned_sizes import Sizes
from lowbit.kernels.gpu.weight_layout import Layout
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

MANY_TOKENS = 512  # from here on by dequantized slices
_WORKSPACE = 32 << 20  # bytes of a slice that stays in L2
MOST_SLICE = 256 << 20  # bytes of one that occupies all SMs


@dataclass(frozen=True)
class Blocks:
    """How ``tile_product`` (``vector_product``: one token) works with up to ``tokens``: BM tokens times one
    of ``heights`` of rows a program.

    ``programs``: of the highest, that an SM holds at one time.
    """

    tokens: int
    BM: int
    heights: tuple[int, ...]
    exact: bool
    num_warps: int
    num_stages: int
    programs: int


_VECTOR = {  # by the columns of a tile
    64: Blocks(1, 1, (128, 64, 32), True, 4, 4, 2),
    32: Blocks(1, 1, (256, 128, 64), True, 4, 4, 2),
    16: Blocks(1, 1, (256, 128, 64), True, 4, 4, 2),
}
# Words: two warps, as a thread's part of x is for 8 rows then, of 128.
_WORDS = {
    64: Blocks(1, 1, (128, 64, 32), True, 2, 4, 4),
    32: Blocks(1, 1, (256, 128, 64), True, 2, 4, 4),
    16: Blocks(1, 1, (256, 128, 64), True, 2, 4, 4),
}
_BLOCKS = (
    Blocks(16, 16, (128, 64), True, 4, 4, 2),
    Blocks(32, 32, (128, 64), True, 4, 4, 2),
    Blocks(128, 64, (128,), True, 8, 3, 1),
    Blocks(MANY_TOKENS - 1, 128, (128,), False, 8, 3, 1),
)
_FLOAT_BLOCKS = (Blocks(16, 16, (64,), False, 4, 2, 2), Blocks(MANY_TOKENS - 1, 32, (64,), False, 4, 2, 2))


@dataclass(frozen=True)
class GpuWeight(PackedWeight):
    """A weight of ``GpuBlocks``, with the ``pointers`` and ``constants`` that all kernels are given."""

    layout: Layout = field(kw_only=True)
    pointers: tuple[Tensor | None, ...] = field(kw_only=True, repr=False)
    constants: Mapping[str, Any] = field(kw_only=True, repr=False)


class GpuBlocks(GpuKernel):
    """See the module docstring. Tables are rounded to x's type, and weights that many tokens meet."""

    name = "gpu_blocks"
    layout = 2

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the scheme cannot run here, or None."""
        if reason := unfit(scheme, shape, device):
            return reason
        layout = weight_layout.layout_of(scheme, shape)
        return layout if isinstance(layout, str) else None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of planes, scales, zero points and offsets."""
        return weight_layout.nbytes(scheme, shape)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Codes in planes, scales as they are."""
        buffers = weight_layout.pack(weight, device)
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        layout = weight_layout.layout_of(scheme, shape)
        fault = layout if isinstance(layout, str) else weight_layout.fault(layout, buffers)
        if isinstance(layout, str) or fault:
            raise ValueError(f"{origin}: {fault}")
        return GpuWeight(
            self,
            scheme,
            shape,
            buffers,
            origin,
            layout=layout,
            pointers=weight_layout.arguments(buffers),
            constants=layout.constants,
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again, block formats taken apart."""
        assert isinstance(packed, GpuWeight), "packed by this kernel"
        return weight_layout.unpack(packed.layout, packed.scheme, packed.shape, packed.buffers, packed.origin)

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) of float32, bfloat16 or float16 -> (tokens, out) of x's type, or ``out``'s."""
        assert isinstance(packed, GpuWeight), "packed by this kernel"
        tokens = x.shape[0]
        x, out = checked(x, packed), output(x, packed, out)
        if x.dtype is torch.float32 and _rounds_floats(x.device):
            x = x.bfloat16()
        order = packed.buffers.get("column_order")
        if order is not None:
            x = x.index_select(1, order)
        if tokens >= MANY_TOKENS:
            _by_slices(x, packed, out)
        elif tokens > 1:
            _by_tiles(x if x.stride(1) == 1 else x.contiguous(), packed, out)
        elif tokens:
            _one_token(x if x.stride(1) == 1 else x.contiguous(), packed, out)
        return out

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in); ids outside the weight are not told, as that would wait for the GPU."""
        assert isinstance(packed, GpuWeight), "packed by this kernel"
        out = torch.empty(len(ids), packed.shape[1], device=ids.device)
        if len(ids):
            _dequantize(packed, out, ids.contiguous(), packed.buffers.get("column_order"))
        return out


def _rounds_floats(device: torch.device) -> bool:
    """Whether float32 x stands for bfloat16: in the interpreter, where a model's activations are float32.

    The CPU's kernels round it too; on a GPU it is float32 by ``--dtype`` and stays so.
    """
    return device.type != "cuda"


def _shape(layout: Layout) -> Shape:
    columns = layout.tile * layout.fields
    rows, _ = layout.shape
    return Shape(rows, layout.runs, columns * layout.bits // 8, columns, max(SPLIT_COLUMNS // columns, 1))


def _sizes(packed: GpuWeight, x: Tensor, blocks: Blocks) -> tuple[Sizes, int]:
    """How a product is launched, as measured or as reckoned, and the runs of a split."""
    layout, tokens = packed.layout, x.shape[0]
    measured = None
    if x.dtype is not torch.float32:
        measured = tuned_sizes.sizes_of(layout, tokens, x.device)
    if measured is None:
        one = cut(
            _shape(layout),
            Tokens.of(tokens, blocks.BM),
            blocks.heights,
            blocks.programs,
            blocks.num_stages,
            multiprocessors(x.device),
        )
        measured = _of(one, blocks)
    each = -(-layout.runs // measured.splits)
    return replace(measured, splits=-(-layout.runs // each)), each


def _of(one: Cut, blocks: Blocks) -> Sizes:
    return Sizes(one.height, one.splits, blocks.num_warps, blocks.num_stages)


def sizes_by_cost(layout: Layout, tokens: int, processors: int) -> list[Sizes]:
    """Of a product of so many tokens in bfloat16, the one that is reckoned the cheapest first."""
    blocks = _vector_blocks(layout) if tokens == 1 else _blocks(_BLOCKS, tokens)
    count = Tokens.of(tokens, blocks.BM)
    found = cuts(_shape(layout), count, blocks.heights, blocks.programs, blocks.num_stages, processors)
    return [_of(one, blocks) for one in found]


def _blocks(table: tuple[Blocks, ...], tokens: int) -> Blocks:
    return next(blocks for blocks in table if tokens <= blocks.tokens)


def _vector_blocks(layout: Layout) -> Blocks:
    return (_WORDS if layout.in_words else _VECTOR)[layout.tile]


def _one_token(x: Tensor, packed: GpuWeight, out: Tensor) -> None:
    from lowbit.kernels.gpu.products import vector_product, word_product

    layout, (rows, columns) = packed.layout, packed.layout.shape
    sizes, each = _sizes(packed, x, _vector_blocks(layout))
    grid = (-(-rows // sizes.height), sizes.splits)
    split = Split.of(out, sizes.splits, grid[0])
    of_launch = {
        "num_warps": sizes.warps,
        "SPLIT": sizes.splits > 1,
        "BN": sizes.height,
        "STAGES": sizes.stages,
    }
    shape = (rows, columns, layout.runs, each)
    if layout.in_words:
        *planes, table, zeros, scale0, scale1, offset0, offset1 = packed.pointers
        words = [None if plane is None else plane.view(torch.int32) for plane in planes]
        levels = (table, zeros, scale0, scale1, offset0, offset1)
        run = layout.tile * layout.fields
        of_run = {"TOGETHER": layout.group % run == 0, "WHOLE": columns % run == 0}
        pointers = (x, out, *split, *words, *levels)
        runtime.launch(word_product, grid, *pointers, *shape, **of_run, **packed.constants, **of_launch)
    else:
        runtime.launch(
            vector_product, grid, x, out, *split, *packed.pointers, *shape, **packed.constants, **of_launch
        )


def _by_tiles(x: Tensor, packed: GpuWeight, out: Tensor) -> None:
    from lowbit.kernels.gpu.products import tile_product

    layout, (rows, columns), tokens = packed.layout, packed.layout.shape, x.shape[0]
    chosen = _blocks(_FLOAT_BLOCKS if x.dtype is torch.float32 else _BLOCKS, tokens)
    sizes, each = _sizes(packed, x, chosen)
    tiles = -(-rows // sizes.height) * -(-tokens // chosen.BM)
    runtime.launch(
        tile_product,
        (tiles, sizes.splits),
        x,
        out,
        *Split.of(out, sizes.splits, tiles),
        *packed.pointers,
        tokens,
        rows,
        columns,
        x.stride(0),
        out.stride(0),
        layout.runs,
        each,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        **packed.constants,
        SPLIT=sizes.splits > 1,
        BM=chosen.BM,
        BN=sizes.height,
        EXACT=chosen.exact,
    )


def _by_slices(x: Tensor, packed: GpuWeight, out: Tensor) -> None:
    """Dequantized rows in x's type, a slice at a time, times x in torch."""
    rows, columns = packed.layout.shape
    step = slice_rows(rows, columns * x.dtype.itemsize, x.shape[0], multiprocessors(x.device))
    workspace = torch.empty(min(step, rows), columns, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        weight = workspace[: min(step, rows - start)]
        _dequantize(packed, weight, start=start)
        _multiply(x, weight, out[:, start : start + len(weight)])


def slice_rows(rows: int, row_bytes: int, tokens: int, processors: int) -> int:
    """Rows dequantized at once, in multiples of 128; all slices alike."""
    tiles = -(-processors // -(-tokens // 128))  # of 256 rows, that every SM has one
    most = max(MOST_SLICE // row_bytes // 128 * 128, 128)
    step = max(min(max(_WORKSPACE // row_bytes, tiles * 256), most), 128)
    return -(-rows // -(-rows // step) // 128) * 128


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T, all but ``out`` of one type."""
    if out.dtype is x.dtype:
        torch.mm(x, weight.T, out=out)
    elif x.is_cuda and out.dtype is torch.float32:
        out.copy_(torch.mm(x, weight.T, out_dtype=torch.float32))  # else sums are rounded to x's type first
    else:
        out.copy_(functional.linear(x, weight))


def _dequantize(
    packed: GpuWeight, out: Tensor, ids: Tensor | None = None, order: Tensor | None = None, start: int = 0
) -> None:
    """Rows ``ids``, or as many as ``out`` has from ``start``; columns as stored, or where ``order`` says."""
    from lowbit.kernels.gpu.products import dequantize

    layout, (rows, columns) = packed.layout, packed.layout.shape
    height = 16 if ids is not None else 2048 // layout.tile  # 16 codes a thread
    runtime.launch(
        dequantize,
        (-(-len(out) // height), layout.runs),
        out,
        ids,
        order,
        *packed.pointers,
        start,
        len(out),
        rows,
        columns,
        **packed.constants,
        BN=height,
    )


class GpuDense(GpuKernel):
    """gpu_dense: f32, f16 and bf16 weights as they are, times x by cuBLAS.

    Where x has another type both become the wider one (f32 for f16 beside bf16), the weight in slices of 64
    MiB at every call: a checkpoint in f16 runs fast under ``--dtype float16``.
    """

    name = "gpu_dense"
    runs = "unquantized"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None; it needs no Triton."""
        if not self.serves(device):
            return runtime.refuses(device)
        if not scheme.is_dense:
            return "weights are quantized"
        return "stacked experts" if len(shape) != 2 else None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the matrix."""
        return shape[0] * shape[1] * int(scheme.weight.bits) // 8

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The matrix itself, detached from a mapped file."""
        buffers = {"matrix": weight.codes.to(device, copy=True).contiguous()}
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffer."""
        matrix = buffers.get("matrix")
        if matrix is None or matrix.shape != shape or matrix.dtype is not scheme.weight.dtype:
            found = "no matrix" if matrix is None else f"{matrix.dtype} {tuple(matrix.shape)}"
            raise ValueError(f"{origin}: {found} instead of {scheme.weight.name} {tuple(shape)}")
        return PackedWeight(self, scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The matrix again."""
        return QuantizedTensor(packed.scheme, packed.shape, packed.buffers["matrix"], origin=packed.origin)

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out) of x's type, or ``out``'s."""
        matrix, rows = packed.buffers["matrix"], packed.shape[0]
        if out is None:
            out = x.new_empty(x.shape[0], rows)
        wide = checked(x, packed).to(torch.promote_types(x.dtype, matrix.dtype))
        if matrix.dtype is torch.bfloat16 and x.dtype is torch.float32 and _rounds_floats(x.device):
            wide = wide.bfloat16().float()
        step = rows if wide.dtype is matrix.dtype else max(_WORKSPACE // (packed.shape[1] * wide.itemsize), 1)
        for start in range(0, rows, step):
            _multiply(wide, matrix[start : start + step].to(wide.dtype), out[:, start : start + step])
        return out

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        return packed.buffers["matrix"].index_select(0, ids).float()
