"""What kernels share whose tiles stand between two transforms: before them of x, behind them of y.

y = outputs * (transform of (tiles * (transform of (inputs * x))))

buffers   data, table    the tiles, in the kernel's order
          outputs        (out, 1), in the type that the scheme's scales have
          inputs         (1, in)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import Description, NativeWeight
from lowbit.kernels.rotation import Rotator
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme


@dataclass(frozen=True)
class TransformedWeight(PackedWeight):
    """A PackedWeight with the tiles as native code multiplies them, and the transforms on both sides."""

    tiles: NativeWeight = field(kw_only=True, repr=False)
    before: Rotator = field(kw_only=True, repr=False)
    after: Rotator = field(kw_only=True, repr=False)


class TransformedKernel(NativeKernel, ABC):
    """Its weights are ``TransformedWeight``. What is rounded is a part of what is lost of x."""

    name: str
    layout: int
    scale: str  # the type of the scales of rows and of columns

    @abstractmethod
    def describe(self, scheme: Scheme, shape: tuple[int, ...]) -> Description:
        """The native description of the tiles."""

    @abstractmethod
    def tiled(self, weight: QuantizedTensor) -> Tensor:
        """uint8: the codes in tiles."""

    @abstractmethod
    def untiled(self, packed: PackedWeight) -> Tensor:
        """uint8 (out, bytes): the inverse of ``tiled``."""

    @abstractmethod
    def transforms(self, inputs: Tensor, outputs: Tensor) -> tuple[Rotation, Rotation]:
        """Before the tiles and behind them; float32 (in,) and (out,)."""

    def table(self, scheme: Scheme) -> Tensor:
        """What numbers are looked up in, the same for all of a scheme: nothing, but every weight has one."""
        return torch.zeros(64, dtype=torch.int16)

    def unscaled(self, scheme: Scheme) -> str | None:
        """Why a scheme has not the scales that the transforms ask for, or None."""
        scale = number_format(self.scale)
        if scheme == Scheme(scheme.weight, ((1, 0), (0, 1)), (scale, scale)):
            return None
        return f"needs a {scale.name} scale for each row and each column, and nothing that is added"

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of tiles and scales."""
        return self.describe(scheme, shape).nbytes + int(number_format(self.scale).bits) // 8 * sum(shape)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same bits, in tiles of 16 rows by 32 columns."""
        outputs, inputs = (scale.clone() for scale in weight.scales)
        data, table = self.tiled(weight), self.table(weight.scheme)
        buffers = {"data": data, "table": table, "outputs": outputs, "inputs": inputs}
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        self.check(scheme, shape, origin)
        dtype = scheme.scales[0].dtype
        assert dtype is not None, "scales are floats"
        wanted = {"outputs": ((shape[0], 1), dtype), "inputs": ((1, shape[1]), dtype)}
        packed_linear.check_buffers(buffers, wanted, origin)
        described, own = self.describe(scheme, shape), {name: buffers[name] for name in ("data", "table")}
        if described.columns != shape[1]:  # x lies there several times
            own["column_order"] = torch.arange(shape[1]).repeat(described.columns // shape[1])
        wide = (shape[0], described.columns)
        scales = (buffers[name].float().flatten() for name in ("inputs", "outputs"))
        before, after = map(Rotator, self.transforms(*scales))
        tiles = packed_linear.around(self, described, scheme, wide, own, origin)
        return TransformedWeight(
            self, scheme, shape, buffers, origin, tiles=tiles, before=before, after=after
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        scales = (packed.buffers["outputs"], packed.buffers["inputs"])
        return QuantizedTensor(
            packed.scheme, packed.shape, self.untiled(packed), scales, origin=packed.origin
        )

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        assert isinstance(packed, TransformedWeight), "packed by this kernel"
        packed_linear.check_columns(x, packed)
        turned = packed.before.rotated(x, torch.float32)
        out = packed_linear.linear(turned, packed.tiles, out)
        packed.after.in_place(out)
        return out
