"""Reference linear kernel: dequantize a slice of rows in torch and multiply. Any scheme, any device.

The oracle of every other kernel and the slow, right path for what has no fast one. Codes stay bit-packed
(at most 1.1 times the scheme's own bytes), and rows are dequantized in slices, so that memory stays near
the packed size. Its matrix product is torch's: row results may differ in the last bit with the number of
rows (architecture.md, "Sameness").
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.numerics.bit_packing import pack_bits, unpack_bits
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.scheme import Scheme

SLICE_WEIGHTS = 1 << 24  # weights dequantized at once: 64 MiB of float32


class Reference:
    """See the module docstring."""

    name = "reference"
    computes = "as stored"
    layout = 1
    steady = False  # torch's product
    runs = "any"

    def serves(self, device: torch.device) -> bool:
        """All."""
        return True

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Never."""
        return None

    def rounds(self, scheme: Scheme) -> bool:
        """Never on a CPU; elsewhere all kernels compute in the model's dtype."""
        return False

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """The scheme's own bytes, but that every zero point of whole numbers takes one."""
        own = scheme.bits_per_weight(shape) * shape[-2] * shape[-1] / 8
        if scheme.zero == "integer":
            rows, columns = scheme.blocks[0]
            blocks = -(-shape[-2] // (rows or shape[-2])) * -(-shape[-1] // (columns or shape[-1]))
            own += blocks * (1 - scheme.weight.bits / 8)
        return round(own)

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Never: nothing here multiplies whole numbers."""
        return False

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """The canonical tensors themselves, codes packed to their bits."""
        buffers = {"codes": self._packed_codes(weight)}
        buffers |= {f"scale{i}": scale for i, scale in enumerate(weight.scales)}
        buffers |= {f"offset{i}": offset for i, offset in enumerate(weight.offsets)}
        if weight.zeros is not None:
            buffers["zeros"] = weight.zeros
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order
        if weight.row_groups is not None:
            buffers["row_groups"] = weight.row_groups
        if weight.codebooks is not None:
            buffers["codebooks"] = weight.codebooks
        if weight.outliers is not None:
            buffers |= {"outlier_starts": weight.outliers.starts, "outliers": weight.outliers.entries}
        # Detached from the mapped file: its pages must not be needed once loading is over.
        owned = {name: buffer.to(device, copy=True).contiguous() for name, buffer in buffers.items()}
        return self.restore(weight.scheme, weight.shape, owned, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        return PackedWeight(self, scheme, shape, buffers, origin)

    @staticmethod
    def _packed_codes(weight: QuantizedTensor) -> Tensor:
        bits = weight.scheme.weight.bits
        if weight.scheme.is_dense or weight.scheme.weight.in_bytes or bits == 8:
            return weight.codes
        return pack_bits(weight.codes, int(bits))

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The canonical weight again."""
        return self._with_codes(self._stored(packed))

    @staticmethod
    def _stored(packed: PackedWeight) -> QuantizedTensor:
        """The buffers as a QuantizedTensor whose codes are still bit-packed: rows can be cut from it."""
        buffers, levels = packed.buffers, range(len(packed.scheme.scales))
        return QuantizedTensor(
            packed.scheme,
            packed.shape,
            buffers["codes"],
            tuple(buffers[f"scale{i}"] for i in levels),
            buffers.get("zeros"),
            tuple(buffers[f"offset{i}"] for i in levels if f"offset{i}" in buffers),
            buffers.get("column_order"),
            packed.origin,
            buffers.get("row_groups"),
            buffers.get("codebooks"),
            Outliers(buffers["outlier_starts"], buffers["outliers"]) if "outliers" in buffers else None,
        )

    @staticmethod
    def _with_codes(stored: QuantizedTensor) -> QuantizedTensor:
        scheme = stored.scheme
        if scheme.is_dense or scheme.weight.in_bytes or scheme.weight.bits == 8:
            return stored
        codes = unpack_bits(stored.codes, int(scheme.weight.bits), stored.shape[-1])
        return replace(stored, codes=codes)

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) @ weight.T in x's dtype, a slice of rows at a time."""
        rows = packed.shape[0]
        if out is None:
            out = x.new_empty(x.shape[0], rows)
        stored, step = self._stored(packed), rows_at_once(packed.scheme, packed.shape)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            weight = self._with_codes(stored.rows(start, stop)).dequantize().to(x.dtype)
            out[:, start:stop] = functional.linear(x, weight)
        return out

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        if not packed.scheme.rows_move:
            return self.unpack(packed).dequantize()[ids.long()]
        wanted = self._stored(packed).permute_rows(ids.long())  # rows stand alone: decode only these
        return self._with_codes(replace(wanted, shape=(len(ids), packed.shape[1]))).dequantize()


def rows_at_once(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Rows of a slice to dequantize: whole blocks of every scale level, at least one."""
    rows, columns = shape
    if not scheme.rows_together:
        return rows  # of some all have to be decoded
    whole = max(scheme.heights) or 1
    if scheme.flattened:
        block = scheme.blocks[0][1]
        whole = block // math.gcd(block, columns)
    return min(max(SLICE_WEIGHTS // columns // whole, 1) * whole, rows)
