"""cpu_trellis: trellises (EXL3) as files hold them, K bits a weight; numbers are made where they are needed.

With T the numbers of the trellis, H blocks of Hadamard's matrix of 128 over the root of 128:

    y = outputs * (H (T^T (H (inputs * x))))

Both transforms are float32 (``rotation``); between them is a product with T (csrc/linear_trellis.h). There
the transformed x becomes whole numbers of 14 bits with a scale for each 32 columns, and T's numbers are
whole, of 14 bits, too: of "3inst" and "mcg" the sum of two halves in units of 2^-11, which float16 would
round as well, of "mul1" 15 times a sum of bytes, less 7654. Products and their sums over 32 columns are exact
in 32 bits, what follows is float32. Beside the definition a product is off by about 2^-11.5 of its size, a
fifth of what bfloat16 costs the inputs of other formats; most of it is that float16 would have rounded T's
numbers and that the definition rounds weights once more. Rows that are looked up are the definition's.

Of sizes that 128 does not divide whole blocks are multiplied: x is padded, and results beside the weight's
own are left out.

    buffers   data           tiles, in csrc/linear_trellis.h's order
              table          nothing; every weight has one
              outputs        float16 (out, 1)
              inputs         float16 (1, in)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import COLUMNS, ROWS, Description, trellis_codes
from lowbit.kernels.transformed_kernel import TransformedKernel
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK, TILE, TrellisLayout

_CHUNKS = 8  # of a tile's bits
_FACTORS = {"3inst": 2.0**-11, "mcg": 2.0**-11, "mul1": 0.00676727294921875 / 15}


class CpuTrellis(TransformedKernel):
    """See the module docstring."""

    name = "cpu_trellis"
    layout = 1
    scale = "f16"

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := super().refuses(scheme, shape, device):
            return reason
        if scheme.weight.trellis is None:
            return "weights are no trellis"
        return self.unscaled(scheme)

    def whole(self, scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
        """Whole blocks of 128 x 128."""
        return _layout(scheme).whole(shape)

    def describe(self, scheme: Scheme, shape: tuple[int, ...]) -> Description:
        """The native description of the tiles."""
        trellis, shape = _layout(scheme), self.whole(scheme, shape)
        return Description.plain(shape, trellis_codes(trellis), factor=_FACTORS[trellis.book])

    def tiled(self, weight: QuantizedTensor) -> Tensor:
        """uint8: blocks of 16 rows of tiles of 32 columns.

        Of a file's tile every 4 bytes are turned round, so that its bits lie from the highest of each byte;
        byte n of all 8 chunks is then a plane.
        """
        trellis = _layout(weight.scheme)
        tiles = trellis.tiles(weight.codes).view(torch.uint8)  # (in / 16, out / 16, bytes)
        bits = tiles.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
        planes = bits.unflatten(-1, (_CHUNKS, -1)).transpose(-1, -2)
        return planes.transpose(0, 1).reshape(-1).clone()

    def untiled(self, packed: PackedWeight) -> Tensor:
        """uint8 (out, bytes): the inverse of ``tiled``."""
        trellis, (rows, columns) = _layout(packed.scheme), self.whole(packed.scheme, packed.shape)
        planes = packed.buffers["data"].view(rows // TILE, columns // TILE, -1, _CHUNKS)
        bits = planes.transpose(0, 1).transpose(-1, -2).flatten(-2)
        tiles = bits.unflatten(-1, (-1, 4)).flip(-1).flatten(-2).contiguous()
        return trellis.codes(tiles.view(torch.int16))

    def before(self, inputs: Tensor) -> Rotation:
        """Hadamard's matrix of each 128."""
        return Rotation(BLOCK, before=inputs, divisor=Rotation.hadamard(BLOCK).divisor)

    def after(self, outputs: Tensor) -> Rotation:
        """Hadamard's matrix of each 128."""
        return Rotation(BLOCK, after=outputs, divisor=Rotation.hadamard(BLOCK).divisor)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        wanted = packed_linear.check_rows(ids, packed)
        whole, found = self.unpack(packed), torch.empty(len(wanted), packed.shape[1])
        skip = _layout(packed.scheme).skip
        for block in ((skip + wanted) // BLOCK).unique().tolist():
            here = (skip + wanted) // BLOCK == block
            first = max(block * BLOCK - skip, 0)
            matrix = whole.rows(first, min((block + 1) * BLOCK - skip, packed.shape[0])).dequantize()
            found[here] = matrix[wanted[here] - first]
        return found


def _layout(scheme: Scheme) -> TrellisLayout:
    trellis = scheme.weight.trellis
    assert trellis is not None, "refuses() was asked first"
    return trellis


assert ROWS == TILE and COLUMNS == 2 * TILE, "a tile is two of a file's"
