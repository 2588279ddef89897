"""gpu_trellis: trellises (EXL3) on NVIDIA GPUs as files hold them, K bits a weight.

With T the numbers of the trellis and H blocks of Hadamard's matrix of 128 over the root of 128:

    y = outputs * (H (T^T (H (inputs * x))))

Three launches: x is turned and becomes float16 with a scale for each 128 columns (``half_inputs``); T's
numbers, float16's own, are made tile by tile and multiplied, on CUDA cores for one token and on tensor cores
for more, with float32 sums (``trellis_products``); the sums of all splits are added and turned. Beside the
definition a product differs by x's float16, 2^-12, and by the last rounding of weights to float16, which is
not made. Rows that are looked up are the definition's but for the order of their sums, which may change a
float16's last bit.

Making a number costs about ten instructions of an SM's 128 lanes, which in the time that an H100's memory
brings a number of 4 bits do four: one token is expected to wait for computing, not for memory. Up to 128
tokens meet a tile decoded once. **None of it has run on a GPU**: it is proven in Triton's interpreter,
and compiled.

Of sizes that 128 does not divide whole blocks are multiplied: x is copied with zeros behind it, and of the
results those that are the weight's own.

Experts of a mixture meet their trellises in the same three launches, whatever they are (``TrellisStack``).

    buffers   words     int32 (out / 16, in / 128, 8 K, 8)
              outputs   float16 (out, 1)
              inputs    float16 (1, in)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.gpu_kernel import (
    SPLIT_COLUMNS,
    Blocks,
    GpuKernel,
    expert_blocks,
    half_blocks,
    unfit,
)
from lowbit.kernels.gpu.programs import Cut, Shape
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK, TILE, TrellisLayout

if TYPE_CHECKING:
    from lowbit.kernels.gpu.expert_rows import SortedPairs

_TURNED = 16  # blocks that a program turns
_DIVISOR = math.sqrt(BLOCK)


class GpuTrellis(GpuKernel):
    """See the module docstring."""

    name = "gpu_trellis"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := unfit(scheme, shape, device):
            return reason
        if scheme.weight.trellis is None:
            return "weights are no trellis"
        half = number_format("f16")
        if scheme != Scheme(scheme.weight, ((1, 0), (0, 1)), (half, half)):
            return "needs a float16 scale for each row and each column, and nothing that is added"
        return None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of words and scales."""
        rows, columns = _layout(scheme).whole(shape)
        return rows * columns * _layout(scheme).bits // 8 + 2 * (rows + columns)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same bits, words of eight tiles beside each other."""
        tiles = _layout(weight.scheme).tiles(weight.codes.to(device)).view(torch.int32)
        words = tiles.unflatten(0, (-1, BLOCK // TILE)).permute(2, 0, 3, 1).contiguous()
        outputs, inputs = (scale.to(device, copy=True).contiguous() for scale in weight.scales)
        buffers = {"words": words, "outputs": outputs, "inputs": inputs}
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        rows, columns = _layout(scheme).whole(shape)
        wanted = {
            "words": (torch.int32, (rows // TILE, columns // BLOCK, 8 * _layout(scheme).bits, 8)),
            "outputs": (torch.float16, (rows, 1)),
            "inputs": (torch.float16, (1, columns)),
        }
        for name, (dtype, size) in wanted.items():
            found = buffers.get(name)
            if found is None or found.dtype is not dtype or found.shape != size:
                raise ValueError(f"{origin}: no {name} of {dtype} {list(size)}")
        return PackedWeight(self, scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        tiles = packed.buffers["words"].permute(1, 3, 0, 2).flatten(0, 1).contiguous()
        codes = _layout(packed.scheme).codes(tiles.view(torch.int16))
        scales = (packed.buffers["outputs"], packed.buffers["inputs"])
        return QuantizedTensor(packed.scheme, packed.shape, codes, scales, origin=packed.origin)

    def multiply(self, x: Tensor, packed: PackedWeight, out: Tensor) -> None:
        """x, whose rows lie whole, into ``out``."""
        layout = _layout(packed.scheme)
        _in_blocks(layout, packed.shape, x, out, lambda x, out: _multiply(x, packed, out))

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in); ids outside the weight are not told, as that would wait for the GPU."""
        layout, (rows, columns) = _layout(packed.scheme), packed.shape
        out = torch.empty(len(ids), layout.blocks(columns), device=ids.device)
        if len(ids):
            _look_up(packed, (ids.clamp(0, rows - 1) + layout.skip).contiguous(), out)
        return out[:, :columns]


def _layout(scheme: Scheme) -> TrellisLayout:
    trellis = scheme.weight.trellis
    assert trellis is not None, "refuses() was asked first"
    return trellis


def _in_blocks(
    layout: TrellisLayout,
    shape: tuple[int, ...],
    x: Tensor,
    out: Tensor,
    multiply: Callable[[Tensor, Tensor], None],
) -> None:
    """``multiply`` x and results of whole blocks, of which a weight of ``shape`` may be a part."""
    rows, columns = layout.whole(shape)
    if columns != shape[1]:
        x = pad(x, (0, columns - shape[1]))
    whole = out if rows == shape[0] else out.new_empty(len(out), rows)
    multiply(x, whole)
    if whole is not out:
        out.copy_(whole[:, layout.skip : layout.skip + shape[0]])


def _multiply(x: Tensor, packed: PackedWeight, out: Tensor) -> None:
    from lowbit.kernels.gpu.trellis_products import trellis_vector

    (tokens, columns), rows, layout = x.shape, out.shape[1], _layout(packed.scheme)
    words, inputs, outputs = (packed.buffers[name] for name in ("words", "inputs", "outputs"))
    blocks = columns // BLOCK
    turned, scale = _turned(x, inputs)
    shape = Shape(rows, blocks, BLOCK * layout.bits // 8, BLOCK, SPLIT_COLUMNS // BLOCK)
    chosen, one = half_blocks(shape, tokens, x.device)
    parts = torch.empty(one.splits, tokens, rows, device=x.device)
    if tokens == 1:
        runtime.launch(
            trellis_vector,
            (rows // one.height, one.splits),
            *(turned, scale, parts, words, rows, blocks, one.each),
            num_warps=chosen.num_warps,
            STAGES=chosen.num_stages,
            BITS=layout.bits,
            BOOK=layout.book,
            BN=one.height,
        )
    else:
        _tiles(turned, scale, words, layout, parts, chosen, one)
    _turn_sums(parts, outputs, out)


def _turned(x: Tensor, inputs: Tensor, chosen: Tensor | None = None, same: int = 1) -> tuple[Tensor, Tensor]:
    """x * inputs, turned: float16 (tokens, columns) and what 128 columns of it are worth.

    ``chosen``: int64 (tokens,), the expert of each, of which ``same`` have one row of x.
    """
    from lowbit.kernels.gpu.half_inputs import turned_halves
    from lowbit.kernels.gpu.rotation import table

    tokens, columns = len(x) if chosen is None else len(chosen), x.shape[1]
    blocks = columns // BLOCK
    turned = torch.empty(tokens, columns, dtype=torch.float16, device=x.device)
    scale = torch.empty(tokens, blocks, device=x.device)
    runtime.launch(
        turned_halves,
        (-(-tokens * blocks // _TURNED),),
        *(x, x.stride(0), turned, scale, inputs, table(x.device), chosen),
        *(tokens, blocks, 1 if chosen is None else len(inputs), _DIVISOR),
        SAME=same,
        M=_TURNED,
    )
    return turned, scale


def _tiles(
    turned: Tensor,
    scale: Tensor,
    words: Tensor,
    layout: TrellisLayout,
    parts: Tensor,
    chosen: Blocks,
    one: Cut,
    sorted_: SortedPairs | None = None,
) -> None:
    """What is turned by T^T, into ``parts`` float32 (splits, tokens, rows)."""
    from lowbit.kernels.gpu.trellis_products import trellis_tile

    tokens, rows = parts.shape[1:]
    token_blocks = -(-tokens // chosen.BM) if sorted_ is None else sorted_.blocks
    experts = (None, None) if sorted_ is None else (sorted_.rows, sorted_.experts)
    runtime.launch(
        trellis_tile,
        (rows // one.height * token_blocks, one.splits),
        *(turned, scale, parts, words, *experts),
        *(tokens, token_blocks, rows, turned.shape[1] // BLOCK, one.each),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        BITS=layout.bits,
        BOOK=layout.book,
        BM=chosen.BM,
        BN=one.height,
    )


def _turn_sums(parts: Tensor, outputs: Tensor, out: Tensor, chosen: Tensor | None = None) -> None:
    """The sums of all splits, turned, * outputs; ``chosen``: of the expert of each token."""
    from lowbit.kernels.gpu.half_inputs import turned_sums
    from lowbit.kernels.gpu.rotation import table

    splits, tokens, rows = parts.shape
    runtime.launch(
        turned_sums,
        (-(-tokens * (rows // BLOCK) // _TURNED),),
        *(parts, out, out.stride(0), outputs, table(out.device), chosen),
        *(tokens, rows // BLOCK, 1 if chosen is None else len(outputs), splits, _DIVISOR),
        M=_TURNED,
    )


@dataclass(frozen=True, eq=False)
class TrellisStack:
    """One trellis of every expert: buffers as of a weight, (experts, ...)."""

    shape: tuple[int, int]
    layout: TrellisLayout
    words: Tensor
    inputs: Tensor
    outputs: Tensor

    most_rows = 128
    gates = False  # an activation is a launch of its own

    @staticmethod
    def of(scheme: Scheme, shape: tuple[int, int], buffers: dict[str, Tensor]) -> TrellisStack:
        """Around the stacked buffers."""
        return TrellisStack(
            shape, _layout(scheme), *(buffers[name] for name in ("words", "inputs", "outputs"))
        )

    def multiply(self, x: Tensor, divisor: int, chosen: Tensor, sorted_: SortedPairs, out: Tensor) -> None:
        """out (pairs, rows): row ``pair // divisor`` of x by the matrix of its expert.

        ``chosen``: int64 (pairs,), which ``sorted_`` has in order. Columns are not split: the experts are
        many.
        """

        def multiply(x: Tensor, out: Tensor) -> None:
            rows, columns = out.shape[1], x.shape[1]
            turned, scale = _turned(x, self.inputs, chosen, divisor)
            parts = torch.empty(1, len(chosen), rows, device=x.device)
            blocks, cut = expert_blocks(sorted_, rows, columns // BLOCK, x.device)
            _tiles(turned, scale, self.words, self.layout, parts, blocks, cut, sorted_)
            _turn_sums(parts, self.outputs, out, chosen)

        _in_blocks(self.layout, self.shape, x, out, multiply)


def _look_up(packed: PackedWeight, ids: Tensor, out: Tensor) -> None:
    """Rows of the definition: H T^T and the outputs' scales, then H again and the inputs', as float16."""
    from lowbit.kernels.gpu.rotation import rotate, table
    from lowbit.kernels.gpu.trellis_products import trellis_row
    from lowbit.numerics.rotation import Rotation

    layout = _layout(packed.scheme)
    rows, columns = layout.whole(packed.shape)
    runtime.launch(
        trellis_row,
        (len(ids), columns // BLOCK),
        *(out, ids, packed.buffers["words"], table(ids.device), rows, columns // BLOCK, _DIVISOR),
        BITS=layout.bits,
        BOOK=layout.book,
    )
    rotate(Rotation.hadamard(BLOCK), out, out, True)
    out *= packed.buffers["inputs"].float()
    out *= packed.buffers["outputs"].float().index_select(0, ids.clamp(0, rows - 1))
    out.copy_(out.half())
