"""SqueezeLLM checkpoints (Kim et al., 2024): each row has a table of 8 or 16 values, and sparse weights of
its own.

    qweight           I32 [in * bits / 32, out]    3 or 4 bits of a column, a little-endian stream
    lookup_table      F32 [out, 2^bits]            a row's values
    rows, cols, vals  I32 [out + 1], I32, F32      outliers, row by row (CSR)
    full_rows         F32 [in, n]                  rows kept whole, as older versions of the tool packed them
    full_row_indices  I32 [n]                      which they are

    weight = lookup_table[code] + outlier + full row, each where it is

The canonical form has one table for all rows: weights are decoded when they are loaded and kept as float16,
16 bits each, whose rounding is less than a thousandth of what the tables leave out; vLLM stores the tables
so. A table in bfloat16 makes a bfloat16 matrix. A file beside the weights, quant_config.json, says ``wbits``
and no method: the tensors do. ``startrows`` is for the kernel alone. Source: the tool's quant.py, pack.py and
kernels.
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
from lowbit.formats.quantization_config import claimed_by_tensors, quantization_config
from lowbit.numerics.bit_packing import unpack_bits, words_to_bytes
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_FLOATS = tuple(DENSE_DTYPES)
_SPARSE = ("rows", "cols", "vals")
_FULL = ("full_rows", "full_row_indices")
_SLICE = 1 << 22  # weights that are decoded at once


class SqueezeLlm(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "squeezellm"
    reference: ClassVar[str] = "squeezellm"
    sign: ClassVar[str] = "lookup_table"
    unused: ClassVar[tuple[str, ...]] = (r".*\.startrows",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = quantization_config(header)
        self.place = found.place if found is not None else "its tensors"
        values = {} if found is None else found.values
        bits = values.get("wbits", values.get("bits"))
        if bits is not None and (type(bits) is not int or bits not in (3, 4)):
            raise LowbitError(
                "E0212", f"{self.place}: wbits must be 3 or 4 for squeezellm, found {printable(repr(bits))}"
            )
        self.bits: int | None = bits
        require_tensors(header, (".lookup_table",), self.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method, or tables of rows."""
        return claimed_by_tensors(header, ".lookup_table", cls.name)

    def describe(self) -> str:
        """What it costs."""
        bits = f"{self.bits}-bit " if self.bits else ""
        place = self.place.split(":")[0]
        return f"squeezellm, {bits}tables of rows in {place}, decoded to 16 bits a weight when loaded"

    def _scheme(self, module: StoredModule) -> Scheme:
        """A plain matrix; every tensor checked."""
        table, _ = self._checked(module)
        return Scheme(number_format("bf16" if table.dtype == "BF16" else "f16"))

    def _tensors(self, module: StoredModule) -> list[str]:
        names = map(module.tensor, ("qweight", "lookup_table", *_SPARSE, *_FULL))
        return [name for name in names if name in self.header.tensors]

    def _checked(self, module: StoredModule) -> tuple[TensorEntry, int]:
        """(the tables, bits of a code)."""
        (out, columns), header = module.shape, self.header
        refuse_stack(module, "SqueezeLLM's packing")
        what = f"SqueezeLLM's {out} x {columns} weight"
        table = entry_of(header, module, "lookup_table", _FLOATS, what)
        bits = 3 if table.shape == (out, 8) else 4 if table.shape == (out, 16) else self.bits or 4
        check_shape(table, (out, 1 << bits), what)
        if self.bits not in (None, bits):
            raise LowbitError(
                "E0213",
                f"{table.file.name}: tensor {table.name!r} has {1 << bits} values for each row, those of "
                f"{bits} bits; {self.place} says wbits {self.bits}. Correct the config",
            )
        packed = entry_of(header, module, "qweight", ("I32",), what)
        if columns % 32:
            raise LowbitError(
                "E0213",
                f"{packed.file.name}: {module.stored!r} has {columns} columns; SqueezeLLM packs multiples of "
                "32. Config and weights are from different models",
            )
        check_shape(packed, (columns // 32 * bits, out), what)
        if any(module.tensor(name) in header.tensors for name in _SPARSE):
            check_shape(entry_of(header, module, "rows", ("I32",), what), (out + 1,), what)
            count = entry_of(header, module, "vals", _FLOATS, what).shape
            check_shape(entry_of(header, module, "cols", ("I32",), what), count[:1], what)
        if any(module.tensor(name) in header.tensors for name in _FULL):
            full = entry_of(header, module, "full_rows", _FLOATS, what)
            count = full.shape[1:2]
            check_shape(full, (columns, *count), what)
            check_shape(entry_of(header, module, "full_row_indices", ("I32",), what), count, what)
        return table, bits

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The matrix, some rows at a time."""
        (out, columns), (table, bits) = module.shape, self._checked(module)
        tables = self._floats(module, "lookup_table", data)
        words = data.tensor(module.tensor("qweight"))
        sparse = self._sparse(module, data) if module.tensor("rows") in self.header.tensors else None
        whole = self._full(module, data) if module.tensor("full_rows") in self.header.tensors else None
        scheme = self._scheme(module)
        matrix = torch.empty(module.shape, dtype=scheme.weight.dtype)
        step = max(1, _SLICE // columns)
        for start in range(0, out, step):
            stop = min(start + step, out)
            codes = unpack_bits(words_to_bytes(words[:, start:stop], 0), bits, columns)
            part = tables[start:stop].gather(1, codes.long())
            if sparse is not None:
                rows, places, values = sparse
                inside = (rows >= start) & (rows < stop)
                at = rows[inside] - start, places[inside]
                part.index_put_(at, values[inside], accumulate=True)
            if whole is not None:
                rows, lines = whole
                inside = (rows >= start) & (rows < stop)
                part.index_add_(0, rows[inside] - start, lines[inside])
            matrix[start:stop] = part
        if not bool(matrix.isfinite().all()):
            raise LowbitError(
                "E0215",
                f"{table.file.name}: weights of {module.stored!r} are too large for {scheme}; the file is "
                "damaged",
            )
        return QuantizedTensor(scheme, module.shape, matrix, origin=origin_of(self.header, module, "qweight"))

    def _floats(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        name = module.tensor(suffix)
        return finite_scales(self.header, name, data.tensor(name)).float()

    def _sparse(self, module: StoredModule, data: TensorData) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of outliers."""
        out, columns = module.shape
        starts, places = (data.tensor(module.tensor(name)).long() for name in ("rows", "cols"))
        counts = starts.diff()
        if int(starts[0]) or int(starts[-1]) != len(places) or bool((counts < 0).any()):
            raise self._damaged(module, "rows", f"must rise from 0 to {len(places)}, the number of cols")
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < columns:
            raise self._damaged(module, "cols", f"must be below {columns}")
        return torch.arange(out).repeat_interleave(counts), places, self._floats(module, "vals", data)

    def _full(self, module: StoredModule, data: TensorData) -> tuple[Tensor, Tensor]:
        """Which rows are kept, and (n, in) what they are."""
        rows = data.tensor(module.tensor("full_row_indices")).long()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < module.shape[0]:
            raise self._damaged(module, "full_row_indices", f"must be below {module.shape[0]}")
        return rows, self._floats(module, "full_rows", data).T

    def _damaged(self, module: StoredModule, suffix: str, must: str) -> LowbitError:
        name = module.tensor(suffix)
        return LowbitError(
            "E0213", f"{self.header.file_of(name)}: tensor {name!r} {must}; the file is damaged"
        )


FORMAT = SqueezeLlm
