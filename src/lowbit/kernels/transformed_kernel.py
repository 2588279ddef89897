"""What kernels share whose tiles stand between two transforms: before them of x, behind them of y.

y = outputs * (transform of (tiles * (transform of (inputs * x))))

Without scales of rows there is no second transform: whoever gathers the products of several ranks does it.

buffers   data, table    the tiles, in the kernel's order
          outputs        (out, 1), in the type that the scheme's scales have; only where there are two
          inputs         (1, in)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_kernel import NativeKernel
from lowbit.kernels.packed_linear import Description, NativeWeight
from lowbit.kernels.rotation import Rotator
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import Scheme

_SCALES = ("inputs", "outputs")


@dataclass(frozen=True)
class TransformedWeight(PackedWeight):
    """A PackedWeight with the tiles as native code multiplies them, and the transforms on both sides.

    ``skip``: rows of the tiles before the weight's own, where it is part of them.
    """

    tiles: NativeWeight = field(kw_only=True, repr=False)
    before: Rotator = field(kw_only=True, repr=False)
    after: Rotator | None = field(kw_only=True, repr=False)
    skip: int = field(default=0, kw_only=True)

    @property
    def rotated(self) -> int:
        """Columns that are transformed: x's and zeros behind them."""
        return int(self.buffers["inputs"].shape[1])


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
    def before(self, inputs: Tensor) -> Rotation:
        """What is done to x; ``inputs``: float32 (in,)."""

    @abstractmethod
    def after(self, outputs: Tensor) -> Rotation:
        """What is done to the product; ``outputs``: float32 (out,)."""

    def whole(self, scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the tiles, which may be more than the weight's."""
        return shape[0], shape[1]

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
        whole = self.whole(scheme, shape)
        scaled = sum(whole) if len(scheme.scales) == 2 else whole[1]
        return self.describe(scheme, shape).nbytes + int(number_format(self.scale).bits) // 8 * scaled

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The same bits, in tiles of 16 rows by 32 columns."""
        buffers = {"data": self.tiled(weight), "table": self.table(weight.scheme)}
        buffers |= {name: scale.clone() for name, scale in zip(_SCALES, weight.scales[::-1], strict=False)}
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        self.check(scheme, shape, origin)
        dtype = scheme.scales[0].dtype
        assert dtype is not None, "scales are floats"
        rows, columns = self.whole(scheme, shape)
        wanted = {"inputs": ((1, columns), dtype), "outputs": ((rows, 1), dtype)}
        scales = _SCALES[: len(scheme.scales)]
        packed_linear.check_buffers(buffers, {name: wanted[name] for name in scales}, origin)
        described = self.describe(scheme, shape)
        own = {name: buffers[name] for name in ("data", "table")}
        if described.columns != columns:  # x lies there several times
            own["column_order"] = torch.arange(columns).repeat(described.columns // columns)
        wide = (rows, described.columns)
        inputs, *outputs = (buffers[name].float().flatten() for name in scales)
        after = [Rotator(self.after(each)) for each in outputs]
        return TransformedWeight(
            self,
            scheme,
            shape,
            buffers,
            origin,
            tiles=packed_linear.around(self, described, scheme, wide, own, origin),
            before=Rotator(self.before(inputs)),
            after=after[0] if after else None,
            skip=0 if scheme.weight.trellis is None else scheme.weight.trellis.skip,
        )

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again."""
        scales = tuple(packed.buffers[name] for name in _SCALES[: len(packed.scheme.scales)][::-1])
        return QuantizedTensor(
            packed.scheme, packed.shape, self.untiled(packed), scales, origin=packed.origin
        )

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        assert isinstance(packed, TransformedWeight), "packed by this kernel"
        packed_linear.check_columns(x, packed)
        rows, columns = self.whole(packed.scheme, packed.shape)
        padded = x if columns == x.shape[1] else pad(x, (0, columns - x.shape[1]))
        whole = out if rows == packed.shape[0] else None
        whole = packed_linear.linear(packed.before.rotated(padded, torch.float32), packed.tiles, whole)
        if packed.after is not None:
            packed.after.in_place(whole)
        if rows == packed.shape[0]:
            return whole
        own = whole[:, packed.skip : packed.skip + packed.shape[0]]
        return own.contiguous() if out is None else out.copy_(own)
