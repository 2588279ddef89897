"""AQLM checkpoints (Egiazarian et al., 2024): sums of codebook vectors, as transformers saves them.

    codebooks  F16, BF16 [M, 2^b, o, g]      M codebooks of 2^b vectors of o x g weights (o is 1, g 8 or 16)
    codes      I8, I16 [out / o, in / g, M]  unsigned; b bits each, wrapped into the signed type
    scales     F16, BF16 [out / o, 1, 1, 1]

    weight[o R + i, g C + j] = scales[R] * sum over m of codebooks[m, codes[R, C, m], i, j]

They stay as they are: indices, with each module's own codebooks. Where no kernel has such (vectors of several
rows on a CPU) they are decoded when they are loaded and kept in the scales' type, 16 bits a weight: sum and
product are made in float32 and rounded once (the tool rounds each, so a last bit may differ).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import number_format, vector_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

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
        """Codebooks and bits; and where it is decoded."""
        books, bits = self.told["num_codebooks"], self.told["nbits_per_codebook"]
        groups = f"groups of {self.told['out_group_size']}x{self.told['in_group_size']}"
        decoded = ", decoded to 16 bits a weight on a CPU" if self.told["out_group_size"] > 1 else ""
        return f"aqlm, {books}x{bits}, {groups} in {self.place.split(':')[0]}{decoded}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """Vectors of codebooks under a scale for their rows."""
        scales, told = self._scales(module), self.told
        height = told["out_group_size"]
        fmt = vector_format(told["num_codebooks"], told["nbits_per_codebook"], told["in_group_size"], height)
        return Scheme(fmt, ((height, 0),), (number_format(DENSE_DTYPES[scales.dtype]),))

    def _tensors(self, module: StoredModule) -> list[str]:
        """Codes, codebooks and scales."""
        return [module.tensor(suffix) for suffix in ("codes", "codebooks", "scales")]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """As it is stored."""
        scheme = self._scheme(module)
        books = finite_scales(
            self.header, module.tensor("codebooks"), data.tensor(module.tensor("codebooks"))
        )
        scales = finite_scales(self.header, module.tensor("scales"), data.tensor(module.tensor("scales")))
        codes = data.tensor(module.tensor("codes"))
        origin = origin_of(self.header, module, "codes")
        bits = self.told["nbits_per_codebook"]
        if bits not in (8, 16):  # those above the middle are stored as negative numbers
            codes = codes & (1 << bits) - 1
        return QuantizedTensor(
            scheme,
            module.shape,
            codes.view(torch.uint8).flatten(1),
            (scales.flatten(1),),
            origin=origin,
            codebooks=books.flatten(2),
        )

    def _scales(self, module: StoredModule) -> TensorEntry:
        """Of the scales; dtypes and shapes of all three tensors checked."""
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
        return scales


FORMAT = Aqlm
