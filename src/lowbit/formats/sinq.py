"""SINQ checkpoints (Müller et al., 2025) as its package and transformers 5 save them: a scale for each group
and one for each column.

    W_q          U8 (3, 5, 6 bits: I32) [rows, g]   packed codes
    meta.scale   F16, F32 [out in / g, 1]           or meta.scale.x U8 [32, n], .s and .m [1, n]: x * s + m
    meta.zero    like the scale; one number for all where the method is "noz"
    meta.scale2  F16, F32 [1, in]                   a scale a column
    model.safetensors.index.json.meta.json          {module: {"meta": {"nbits", "method", "shape", …}}}

    weight[r, c] = (code - zero[group]) * scale[group] * scale2[c]

The matrix (out in / g, g) of codes, groups of a row, is packed along its first dimension as HQQ's is; ten
codes of 3 bits, six of 5 or five of 6 lie in an int32, the first highest. Scales and zero points that were
rounded to 8 bits are taken out of them in their own float type, as the tool does. ``zero`` is a float in
code units; codes of an nf4 method mean that table's values (which the tool rounds to the scales' type).

scale2 multiplies columns: canonically x is multiplied by it, and the weight is groups of plain codes. Tiles
("2D": scale2 [tiles, 1, g], a column's scale for g rows) are a second level of blocks instead:
``kernels.cpu_columns`` multiplies x by the scales of each g rows and rounds it to bfloat16 then. nf4 with its
zero points has no native form and runs on the reference kernel. Experts are left in floats by the tool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import (
    InputRule,
    Notes,
    StoredModule,
    check_shape,
    entry_of,
    finite_scales,
    require_tensors,
)
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.hqq import unpack
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

SIDECAR = "model.safetensors.index.json.meta.json"
_PER_ITEM = {1: 8, 2: 4, 3: 10, 4: 2, 5: 6, 6: 5, 8: 1}
_WORDS = (3, 5, 6)  # bits whose items are int32
_WHAT = "a SINQ weight"


@dataclass(frozen=True)
class _Layout:
    bits: int
    size: int  # columns of a group
    groups: int
    scale: str  # the scales' number format
    tiled: bool
    nf4: bool

    @property
    def scheme(self) -> Scheme:
        code = number_format("nf4" if self.nf4 else f"uint{self.bits}")
        blocks: tuple[tuple[int, int], ...] = ((1, self.size),)
        if self.tiled:
            blocks += ((self.size, 1),)
        return Scheme(code, blocks, (number_format(self.scale),) * len(blocks), zero="float")


class Sinq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "sinq"
    reference: ClassVar[str] = "sinq"
    sign: ClassVar[str] = "W_q"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place, self.values = found.place, found.values
        self._bits(self.values, self.place)
        self.told = read_json(header, SIDECAR) or {}
        require_tensors(header, (".W_q",), self.place, self.name)

    def describe(self) -> str:
        """Bits and groups, as the config has them."""
        bits, size = (printable(self.values.get(key, "?")) for key in ("nbits", "group_size"))
        return f"sinq, {bits}-bit group {size} in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the shapes of codes and scales."""
        return self._layout(module).scheme

    def _tensors(self, module: StoredModule) -> list[str]:
        """Codes and everything under meta."""
        meta = [name for key in ("scale", "zero", "scale2") for name in self._parts(module, key)]
        return [module.tensor("W_q"), *meta]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked, scales and zero points taken out of their 8 bits."""
        layout, (out, columns) = self._layout(module), module.shape
        codes = _unpacked(data.tensor(module.tensor("W_q")), layout)
        name = module.tensor("W_q")
        if int(codes.max()) >> layout.bits or (layout.nf4 and int(codes.max()) > 15):
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} holds code {int(codes.max())}, more than "
                f"{layout.bits} bits; the packing does not match {SIDECAR}",
            )
        scale, zero = (self._numbers(module, key, layout, data) for key in ("scale", "zero"))
        scales: tuple[Tensor, ...] = (scale,)
        if layout.tiled:
            # Tile (i, j) has a column's scales as they stand: (tiles, 1, g) -> (out / g, in).
            scales = (scale, self._of_columns(module, data).reshape(out // layout.size, columns))
        return QuantizedTensor(
            layout.scheme,
            module.shape,
            codes.reshape(module.shape),
            scales,
            zero.to(scale.dtype),
            origin=origin_of(self.header, module, "W_q"),
        )

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """x times a scale for each column; tiles have theirs in the weight."""
        if self._layout(module).tiled:
            return None
        return InputRule(multiplier=self._of_columns(module, data).reshape(module.shape[1]).float())

    def _of_columns(self, module: StoredModule, data: TensorData) -> Tensor:
        """scale2, as stored."""
        name = module.tensor("meta.scale2")
        return finite_scales(self.header, name, data.tensor(name))

    def _meta(self, module: StoredModule) -> dict[str, object]:
        """What the sidecar says of the module."""
        leaf = self.told.get(module.stored)
        meta = leaf.get("meta") if isinstance(leaf, dict) else None
        return meta if isinstance(meta, dict) else {}

    def _bits(self, values: dict[str, object], place: str) -> int | None:
        bits = values.get("nbits")
        bits = 2 if bits == 1.58 else bits
        if bits is not None and (type(bits) is not int or bits not in _PER_ITEM):
            raise LowbitError(
                "E0212",
                f"{place}: nbits must be one of {', '.join(map(str, _PER_ITEM))}, found "
                f"{printable(repr(values['nbits']))}",
            )
        return None if bits is None else int(str(bits))

    def _parts(self, module: StoredModule, key: str) -> list[str]:
        """The tensors that hold ``meta.<key>``: itself, or its 8-bit form."""
        whole = module.tensor(f"meta.{key}")
        if whole in self.header.tensors or key == "scale2":
            return [whole]
        return [f"{whole}.{part}" for part in ("x", "s", "m")]

    def _layout(self, module: StoredModule) -> _Layout:
        refuse_stack(module, "SINQ's packing")
        (out, columns), meta = module.shape, self._meta(module)
        weight = entry_of(self.header, module, "W_q", ("U8", "I32"), _WHAT)
        told = meta or self.values
        bits = self._bits(told, SIDECAR if meta else self.place)
        size = weight.shape[1] if len(weight.shape) == 2 else 0
        if bits is None or not size or columns % size:
            raise self._wrong(weight, module, "codes of known bits in groups that divide a row")
        groups = out * columns // size
        rows = -(-groups // _PER_ITEM[bits])
        if weight.dtype != ("I32" if bits in _WORDS else "U8") or weight.shape != (rows, size):
            raise self._wrong(weight, module, f"{bits}-bit codes as {rows} x {size}")
        method = told.get("method", "")
        nf = str(method).lower()
        if "nf3" in nf:
            raise LowbitError(
                "E0218",
                f"{SIDECAR}: method {printable(repr(method))} has a table of 8 values, which is not read; "
                "use a SINQ version with whole codes",
            )
        second = entry_of(self.header, module, "meta.scale2", tuple(DENSE_DTYPES), _WHAT)
        tiled = len(second.shape) == 3
        if tiled and out % size:
            raise self._wrong(second, module, "one scale a column")
        tiles = groups // size if tiled else 0
        check_shape(second, (tiles, 1, size) if tiled else (1, columns), _WHAT)
        scale = self._check_numbers(module, "scale", groups)
        self._check_numbers(module, "zero", groups)
        return _Layout(bits, size, groups, DENSE_DTYPES[scale.dtype], tiled, "nf4" in nf)

    def _check_numbers(self, module: StoredModule, key: str, groups: int) -> TensorEntry:
        """The tensor whose type the numbers have; shapes checked."""
        names = self._parts(module, key)
        suffix = f"meta.{key}"
        if len(names) == 1:
            entry = entry_of(self.header, module, suffix, tuple(DENSE_DTYPES), _WHAT)
            if math.prod(entry.shape) != groups and not (key == "zero" and entry.shape == ()):
                raise self._wrong(entry, module, f"{groups} numbers, one a group")
            return entry
        codes = entry_of(self.header, module, f"{suffix}.x", ("U8",), _WHAT)
        step = entry_of(self.header, module, f"{suffix}.s", tuple(DENSE_DTYPES), _WHAT)
        if len(codes.shape) != 2 or math.prod(codes.shape) != groups:
            raise self._wrong(codes, module, f"{groups} numbers, one a group")
        check_shape(step, (1, codes.shape[1]), _WHAT)
        check_shape(entry_of(self.header, module, f"{suffix}.m", (step.dtype,), _WHAT), step.shape, _WHAT)
        return step

    def _wrong(self, entry: TensorEntry, module: StoredModule, expected: str) -> LowbitError:
        return LowbitError(
            "E0213",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; for a weight "
            f"of {list(module.shape)} {expected} are expected ({SIDECAR}, {self.place})",
        )

    def _numbers(self, module: StoredModule, key: str, layout: _Layout, data: TensorData) -> Tensor:
        """(out, groups of a row) scales or zero points."""
        names = self._parts(module, key)
        stored = [data.tensor(name) for name in names]
        if len(stored) == 3:
            codes, step, least = stored
            for name, tensor in zip(names[1:], (step, least), strict=True):
                finite_scales(self.header, name, tensor)
            numbers = codes * step + least  # in the step's own type, as the tool has it
        else:
            numbers = finite_scales(self.header, names[0], stored[0])
        (out, columns), size = module.shape, layout.size
        if numbers.ndim == 0:
            return numbers.expand(out, columns // size).contiguous()
        if layout.tiled:  # (tiles, g, 1), tiles row by row
            return numbers.reshape(out // size, columns // size, size).transpose(1, 2).reshape(out, -1)
        return numbers.reshape(out, columns // size)


def _unpacked(items: Tensor, layout: _Layout) -> Tensor:
    """uint8 (groups, size)."""
    grid = (layout.groups, layout.size)
    if layout.bits in (5, 6):
        count, mask = _PER_ITEM[layout.bits], (1 << layout.bits) - 1
        slabs = [(items >> layout.bits * (count - 1 - n) & mask).to(torch.uint8) for n in range(count)]
        return torch.cat(slabs)[: layout.groups]
    return unpack(items.reshape(-1).view(torch.uint8), layout.bits, grid)


FORMAT = Sinq
