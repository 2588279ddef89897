"""AQLM checkpoints (Egiazarian et al., 2024): sums of codebook vectors, as transformers saves them.

    codebooks  F16, BF16 [M, 2^b, o, g]      M codebooks of 2^b vectors of o x g weights (o is 1, g 8 or 16)
    codes      I8, I16 [out / o, in / g, M]  unsigned; b bits each, wrapped into the signed type
    scales     F16, BF16 [out / o, 1, 1, 1]

    weight[o R + i, g C + j] = scales[R] * sum over m of codebooks[m, codes[R, C, m], i, j]

Vectors of one row (o = 1) stay as they are: indices, with each module's own codebooks. Taller ones are
decoded when they are loaded and kept in the codebooks' type, 16 bits a weight: sum and product are made in
float32 and rounded once (the tool rounds each, so a last bit may differ).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format, vector_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_NUMBERS = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}
_WHAT = "an AQLM weight"


class Aqlm(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "aqlm"
    reference: ClassVar[str] = "aqlm"
    sign: ClassVar[str] = "codebooks"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        self.told: dict[str, int] = {}
        for key, default in _NUMBERS.items():
            value = found.values.get(key, default)
            limit = 16 if key == "nbits_per_codebook" else 1024
            if type(value) is not int or not 1 <= value <= limit:
                raise LowbitError(
                    "E0212",
                    f"{self.place}.{key} must be a whole number from 1 to {limit}, found "
                    f"{printable(repr(value))}",
                )
            self.told[key] = value
        require_tensors(header, (".codebooks",), self.place, self.name)

    def describe(self) -> str:
        """Codebooks and bits; and that it is decoded, where it is."""
        books, bits = self.told["num_codebooks"], self.told["nbits_per_codebook"]
        groups = f"groups of {self.told['out_group_size']}x{self.told['in_group_size']}"
        decoded = "" if self._by_rows else ", decoded to 16 bits a weight when loaded"
        return f"aqlm, {books}x{bits}, {groups} in {self.place.split(':')[0]}{decoded}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """Vectors of codebooks under a scale a row; or dense, in the codebooks' type."""
        books, scales = self._entries(module)
        if not self._by_rows:
            return dense(DENSE_DTYPES[books.dtype])
        sizes = (self.told[key] for key in ("num_codebooks", "nbits_per_codebook", "in_group_size"))
        return Scheme(vector_format(*sizes), ((1, 0),), (number_format(DENSE_DTYPES[scales.dtype]),))

    def _tensors(self, module: StoredModule) -> list[str]:
        """Codes, codebooks and scales."""
        return [module.tensor(suffix) for suffix in ("codes", "codebooks", "scales")]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """As it is stored, or decoded, a slice of rows at a time."""
        scheme = self._scheme(module)
        books = finite_scales(
            self.header, module.tensor("codebooks"), data.tensor(module.tensor("codebooks"))
        )
        scales = finite_scales(self.header, module.tensor("scales"), data.tensor(module.tensor("scales")))
        codes = data.tensor(module.tensor("codes"))
        origin = origin_of(self.header, module, "codes")
        if not self._by_rows:
            return QuantizedTensor(scheme, module.shape, decode(codes, books, scales), origin=origin)
        bits = self.told["nbits_per_codebook"]
        if bits not in (8, 16):  # those above the middle are stored as negative numbers
            codes = codes & (1 << bits) - 1
        return QuantizedTensor(
            scheme,
            module.shape,
            codes.view(torch.uint8).flatten(1),
            (scales.flatten(1),),
            origin=origin,
            codebooks=books.squeeze(2),
        )

    @property
    def _by_rows(self) -> bool:
        """Whether a vector lies in one row."""
        return self.told["out_group_size"] == 1

    def _entries(self, module: StoredModule) -> tuple[TensorEntry, TensorEntry]:
        """The codebooks and scales; dtypes and shapes of all three checked."""
        refuse_stack(module, "AQLM's codes")
        (out, columns), told = module.shape, self.told
        rows, width = told["out_group_size"], told["in_group_size"]
        books, bits = told["num_codebooks"], told["nbits_per_codebook"]
        what = f"{_WHAT} of {out} x {columns} with {books} codebooks of {bits} bits"
        entry = entry_of(self.header, module, "codebooks", tuple(DENSE_DTYPES), what)
        if out % rows or columns % width:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: {module.stored!r} is {out} x {columns}; {self.place} cuts it into "
                f"groups of {rows} x {width}. Config and weights are from different models",
            )
        check_shape(entry, (books, 1 << bits, rows, width), what)
        codes = entry_of(self.header, module, "codes", ("I8",) if bits <= 8 else ("I16",), what)
        check_shape(codes, (out // rows, columns // width, books), what)
        scales = entry_of(self.header, module, "scales", tuple(DENSE_DTYPES), what)
        check_shape(scales, (out // rows, 1, 1, 1), what)
        return entry, scales


def decode(codes: Tensor, books: Tensor, scales: Tensor) -> Tensor:
    """(out, in) in the codebooks' type; codes (R, C, M), books (M, 2^b, o, g), scales (R, 1, 1, 1)."""
    rows, groups, count = codes.shape
    size, high, width = books.shape[1:]
    weight = torch.empty(rows * high, groups * width, dtype=books.dtype)
    step = max(1, (1 << 22) // max(1, groups * width * high))
    for start in range(0, rows, step):
        part = codes[start : start + step].long() & (size - 1)
        total = books[0].float()[part[..., 0]]  # (rows, groups, o, g)
        for number in range(1, count):
            total += books[number].float()[part[..., number]]
        total *= scales[start : start + step].float()
        flat = total.transpose(1, 2).reshape(-1, groups * width)
        weight[start * high : start * high + len(flat)] = flat.to(books.dtype)
    return weight


FORMAT = Aqlm
