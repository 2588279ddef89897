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

    buffers   data           tiles, in csrc/linear_trellis.h's order
              table          nothing; every weight has one
              outputs        float16 (out, 1)
              inputs         float16 (1, in)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import (
    ADDEND_NONE,
    COLUMNS,
    INPUT_BFLOAT,
    ROWS,
    SCALES_NONE,
    Description,
    NativeWeight,
    trellis_codes,
)
from lowbit.kernels.rotation import Rotator
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.trellis import BLOCK, TILE

_CHUNKS = 8  # of a tile's bits
_FACTORS = {"3inst": 2.0**-11, "mcg": 2.0**-11, "mul1": 0.00676727294921875 / 15}


@dataclass(frozen=True)
class TransformedWeight(PackedWeight):
    """A PackedWeight with the tiles as native code multiplies them, and the transforms on both sides."""

    tiles: NativeWeight = field(kw_only=True, repr=False)
    before: Rotator = field(kw_only=True, repr=False)
    after: Rotator = field(kw_only=True, repr=False)


class TransformedKernel(NativeKernel):
    """Of tiles between two transforms. What is rounded is a part of what is lost of x."""

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        assert isinstance(packed, TransformedWeight), "packed by this kernel"
        if x.shape[1] != packed.shape[1]:
            raise LowbitError(
                "E0703", f"{packed.origin}: input has {x.shape[1]} columns, weight {packed.shape[1]}"
            )
        turned = packed.before.rotated(x, torch.float32)
        out = packed_linear.linear(turned, packed.tiles, out)
        packed.after.in_place(out)
        return out

    def check_rows(self, packed: PackedWeight, ids: Tensor) -> None:
        """E0703 where a row is asked for that there is not."""
        rows = packed.shape[0]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise LowbitError("E0703", f"{packed.origin}: a row outside 0..{rows - 1} was asked for")


class CpuTrellis(TransformedKernel):
    """See the module docstring."""

    name = "cpu_trellis"
    layout = 1

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the weight cannot run here, or None."""
        if reason := packed_linear.unfit(scheme, shape, device):
            return reason
        if scheme.weight.trellis is None:
            return "weights are no trellis"
        half = number_format("f16")
        if scheme != Scheme(scheme.weight, ((1, 0), (0, 1)), (half, half)):
            return "needs a float16 scale for each row and each column, and nothing that is added"
        return "is no whole blocks of 128 x 128" if any(size % BLOCK for size in shape) else None

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of tiles and scales."""
        return _describe(scheme, shape).nbytes + 2 * (shape[0] + shape[1])

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same bits, in tiles of 16 rows by 32 columns."""
        outputs, inputs = weight.scales
        buffers = {
            "data": _packed(weight),
            "table": torch.zeros(64, dtype=torch.int16),
            "outputs": outputs.clone(),
            "inputs": inputs.clone(),
        }
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        if reason := self.refuses(scheme, shape, torch.device("cpu")):
            raise ValueError(f"{origin}: {reason}")
        for name, wanted in (("outputs", (shape[0], 1)), ("inputs", (1, shape[1]))):
            found = buffers.get(name)
            if found is None or found.dtype is not torch.float16 or found.shape != wanted:
                raise ValueError(f"{origin}: no {name} of float16 {list(wanted)}")
        own = {name: buffers[name] for name in ("data", "table")}
        tiles = packed_linear.around(self, _describe(scheme, shape), scheme, shape, own, origin)
        divisor = Rotation.hadamard(BLOCK).divisor
        before = Rotation(BLOCK, before=buffers["inputs"].float().flatten(), divisor=divisor)
        after = Rotation(BLOCK, after=buffers["outputs"].float().flatten(), divisor=divisor)
        return TransformedWeight(
            self,
            scheme,
            shape,
            buffers,
            origin,
            tiles=tiles,
            before=Rotator(before),
            after=Rotator(after),
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        scales = (packed.buffers["outputs"], packed.buffers["inputs"])
        return QuantizedTensor(packed.scheme, packed.shape, _codes(packed), scales, origin=packed.origin)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        self.check_rows(packed, ids)
        wanted = ids.long()
        whole, found = self.unpack(packed), torch.empty(len(wanted), packed.shape[1])
        for block in (wanted // BLOCK).unique().tolist():
            here = wanted // BLOCK == block
            matrix = whole.rows(block * BLOCK, (block + 1) * BLOCK).dequantize()
            found[here] = matrix[wanted[here] % BLOCK]
        return found


def _describe(scheme: Scheme, shape: tuple[int, ...]) -> Description:
    """The native description of the tiles."""
    trellis = scheme.weight.trellis
    assert trellis is not None, "refuses() was asked first"
    factor, columns = _FACTORS[trellis.book], shape[1]
    codes = trellis_codes(trellis)
    return Description(
        None, None, shape[0], columns, codes, columns, SCALES_NONE, ADDEND_NONE, INPUT_BFLOAT, factor
    )


def _packed(weight: QuantizedTensor) -> Tensor:
    """uint8: blocks of 16 rows of tiles of 32 columns.

    Of a file's tile every 4 bytes are turned round, so that its bits lie from the highest of each byte; byte
    n of all 8 chunks is then a plane.
    """
    trellis = weight.scheme.weight.trellis
    assert trellis is not None, "refuses() was asked first"
    tiles = trellis.tiles(weight.codes).view(torch.uint8)  # (in / 16, out / 16, bytes)
    planes = tiles.unflatten(-1, (-1, 4)).flip(-1).flatten(-2).unflatten(-1, (_CHUNKS, -1)).transpose(-1, -2)
    return planes.transpose(0, 1).reshape(-1).clone()


def _codes(packed: PackedWeight) -> Tensor:
    """uint8 (out, bytes): the inverse of ``_packed``."""
    trellis, (rows, columns) = packed.scheme.weight.trellis, packed.shape
    assert trellis is not None, "it was packed"
    planes = packed.buffers["data"].view(rows // TILE, columns // TILE, -1, _CHUNKS)
    bits = planes.transpose(0, 1).transpose(-1, -2).flatten(-2)
    tiles = bits.unflatten(-1, (-1, 4)).flip(-1).flatten(-2).contiguous()
    return trellis.codes(tiles.view(torch.int16))


assert ROWS == TILE and COLUMNS == 2 * TILE, "a tile is two of a file's"
