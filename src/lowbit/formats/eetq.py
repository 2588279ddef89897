"""EETQ checkpoints: int8 weights, a scale a row, in the order in which its GEMM (FasterTransformer's) reads.

    weight or qweight   I8 [in, out]    a shape without meaning: see below
    weight_scales       F16, F32 [out]

    weight[r, c] = (byte - 128) * weight_scales[r]

What the bytes went through on a card of compute capability 7.5 or later, all of it turned back here:

    1. of each 16 input columns the order became 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15
    2. the matrix lies as (out, in)
    3. two rows share a line: 64 columns of the one, 64 of the other, then the next 64 of the first
    4. 128 was added, and of each four bytes the middle two changed places

A card of capability 7.0 (Volta) has step 4 alone, and nothing in the file says so. The numbers do: a row's
scale is its largest |weight| / 128, so that each has a code of 127 or -128. In the wrong order many rows have
none; a matrix is read as Volta's where all rows have one in that order and not all in the other.

Inputs are not quantized. Source: the tool's quantizer and its cutlass_preprocessors.cc.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import origin_of
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_SCALES = {"F16": "f16", "F32": "f32", "BF16": "bf16"}
_WHAT = "an EETQ weight"
_TILE = 64
# Where each of 16 columns lies after step 1: the inverse of the order above.
_PLACES = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)


class Eetq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "eetq"
    reference: ClassVar[str] = "eetq"
    sign: ClassVar[str] = "weight_scales"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        weights = found.values.get("weights", "int8")
        if weights != "int8":
            raise LowbitError(
                "E0212", f"{self.place}.weights must be int8 for eetq, found {printable(repr(weights))}"
            )
        require_tensors(header, (".weight_scales",), self.place, self.name)

    def describe(self) -> str:
        """There is one kind."""
        return f"eetq, int8 per channel in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """int8, a scale a row."""
        _, scale = self._entries(module)
        return Scheme(number_format("int8"), ((1, 0),), (number_format(_SCALES[scale.dtype]),))

    def _tensors(self, module: StoredModule) -> list[str]:
        """Bytes and scales."""
        weight, scale = self._entries(module)
        return [weight.name, scale.name]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The bytes in the order of rows and columns."""
        weight, scale = self._entries(module)
        scales = finite_scales(self.header, scale.name, data.tensor(scale.name))
        return QuantizedTensor(
            self.scheme_of(module),
            module.shape,
            told_in_order(data.raw(weight.name), module.shape),
            (scales.unsqueeze(1),),
            origin=origin_of(self.header, module, "weight_scales"),
        )

    def _entries(self, module: StoredModule) -> tuple[TensorEntry, TensorEntry]:
        """Bytes and scales, dtypes and shapes checked."""
        refuse_stack(module, "EETQ's layout")
        out, columns = module.shape
        suffix = "qweight" if module.tensor("qweight") in self.header.tensors else "weight"
        weight = entry_of(self.header, module, suffix, ("I8",), _WHAT)
        check_shape(weight, (columns, out), _WHAT)
        if columns % _TILE or out % _TILE:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} is {list(weight.shape)}; EETQ's layout is made "
                f"of tiles of {_TILE} x {_TILE}. Config and weights are from different models",
            )
        scale = entry_of(self.header, module, "weight_scales", tuple(_SCALES), _WHAT)
        check_shape(scale, (out,), _WHAT)
        return weight, scale


def told_in_order(raw: Tensor, shape: tuple[int, int]) -> Tensor:
    """uint8 (bytes,) as stored -> uint8 codes (out, in), in the layout whose rows reach their ends."""
    codes = in_order(raw, shape)
    if not _all_reach_the_end(codes):
        other = in_order_of_volta(raw, shape)
        codes = other if _all_reach_the_end(other) else codes
    return codes


def _all_reach_the_end(codes: Tensor) -> bool:
    """Whether each row has a code of -128 or 127."""
    return bool(((codes.amin(1) == 0) | (codes.amax(1) == 255)).all())


def in_order_of_volta(raw: Tensor, shape: tuple[int, int]) -> Tensor:
    """uint8 (bytes,) as stored on a card of capability 7.0 -> uint8 codes (out, in), 128 in the middle."""
    out, columns = shape
    straight = raw.view(-1, 4)[:, [0, 2, 1, 3]]  # step 4
    return straight.reshape(columns, out).T.contiguous()


def in_order(raw: Tensor, shape: tuple[int, int]) -> Tensor:
    """uint8 (bytes,) as stored -> uint8 codes (out, in), 128 in the middle."""
    out, columns = shape
    straight = raw.view(-1, 4)[:, [0, 2, 1, 3]]  # step 4; the 128 stays
    lines = straight.reshape(out // 2, columns // _TILE, 2, _TILE)
    rows = lines.transpose(1, 2).reshape(out, columns // 16, 16)  # step 3
    return rows[..., torch.tensor(_PLACES)].reshape(out, columns)  # step 1


FORMAT = Eetq
