"""VPTQ checkpoints (Liu et al., 2024): vectors of output rows from codebooks, as transformers saves them.

    centroids.weight          F16, BF16 [N, C v]    N codebooks of C vectors of v output rows
    res_centroids.weight      [N, R v]              a second codebook, added to the first
    indices                   I32 [N, ceil(out / v), ceil(s b / 32)]   s columns a codebook
    outlier_centroids.weight, outlier_indices       [1, Co vo], I16 [1, ceil(out / vo), o]
    perm                      I16 [in]              the input column of each stored one
    weight_scale, weight_bias F16, BF16 [in]

An index has b = log2 C + log2 R bits, the first codebook's low; indices of a row follow one another from the
lowest bit. Vector i of column c is rows v i to v i + v - 1. Stored columns are the o outliers, then those of
each codebook. With u the matrix in the input's order of columns,

    weight[r, c] = u[r, c] * weight_scale[c] + weight_bias[c]

The sizes are the config's (``config_for_layers``, else ``shared_layer_config`` by the module's last name) and
must agree with the tensors. GPTQModel says them once for all modules and leaves what depends on a module's
columns to be counted: ``npercent`` outliers in a hundred, rounded up, the rest in groups of ``group_size`` or
in ``group_num`` groups; its outliers' indices and ``perm`` are I32.

Indices stay indices, with each module's own codebooks; outliers, a few columns, become their numbers. What no
kernel runs so is decoded when it is loaded and kept in the codebooks' type, 16 bits a weight: sums are made
in float32 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from lowbit.numerics.bit_packing import unpack_words
from lowbit.numerics.number_formats import RowVectorLayout, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_WHAT = "a VPTQ weight"
_SLICE = 1 << 22  # bits of indices that are taken apart at once


@dataclass(frozen=True)
class _Rule:
    """One layer's sizes. ``residual``, ``outliers``: 0 where there are none."""

    books: int
    width: int  # columns a codebook
    vector: int
    centroids: int
    residual: int
    outliers: int
    outlier_vector: int
    outlier_centroids: int
    permuted: bool
    scaled: bool

    @property
    def bits(self) -> tuple[int, int]:
        """Of an index: (main, residual)."""
        return (self.centroids - 1).bit_length(), max(0, self.residual - 1).bit_length()

    def layout(self, dtype: str) -> RowVectorLayout:
        """How the codes of ``read`` lie. ``dtype``: the codebooks'."""
        parted = self.books > 1 or self.outliers > 0
        return RowVectorLayout(
            self.vector,
            self.centroids,
            self.residual,
            dtype,
            self.books,
            self.width if parted else 0,
            self.outliers,
        )


class Vptq(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "vptq"
    reference: ClassVar[str] = "vptq"
    sign: ClassVar[str] = "centroids.weight"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        self.common = found.values if "vector_lens" in found.values else None
        self.rules: dict[str, dict[str, object]] = {}
        for key in ("shared_layer_config", "config_for_layers"):
            layers = found.values.get(key) or {}
            if not isinstance(layers, dict) or not all(isinstance(rule, dict) for rule in layers.values()):
                raise LowbitError("E0212", f"{self.place}.{key} must map modules to their sizes")
            self.rules |= layers
        require_tensors(header, (".centroids.weight",), self.place, self.name)

    def describe(self) -> str:
        """Where it says so."""
        return f"vptq in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """Vectors of rows, under a scale and an offset of columns."""
        entry, rule = self._checked(module)
        fmt = number_format(rule.layout(DENSE_DTYPES[entry.dtype]).name)
        if not rule.scaled:
            return Scheme(fmt, reordered=rule.permuted)
        kinds = {self.header.tensors[module.tensor(name)].dtype for name in ("weight_scale", "weight_bias")}
        kind = DENSE_DTYPES[kinds.pop()] if len(kinds) == 1 else "f32"
        return Scheme(fmt, ((0, 1),), (number_format(kind),), offset=True, reordered=rule.permuted)

    def _tensors(self, module: StoredModule) -> list[str]:
        """What its sizes say there is."""
        _, rule = self._checked(module)
        names = ["centroids.weight", "indices"]
        names += ["res_centroids.weight"] * (rule.residual > 0)
        names += ["outlier_centroids.weight", "outlier_indices"] * (rule.outliers > 0)
        names += ["perm"] * rule.permuted + ["weight_scale", "weight_bias"] * rule.scaled
        return [module.tensor(name) for name in names]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """As it is stored, an index in whole bytes."""
        _, rule = self._checked(module)
        scheme = self._scheme(module)
        layout = scheme.weight.vectors
        assert isinstance(layout, RowVectorLayout), "its name says so"
        order = self._order(module, data) if rule.permuted else None

        def of_columns(suffix: str) -> Tensor:
            """(1, in), in stored order."""
            numbers = self._floats(module, suffix, data).to(scheme.scales[0].dtype)
            return (numbers if order is None else numbers[order]).unsqueeze(0)

        return QuantizedTensor(
            scheme,
            module.shape,
            self._codes(module, rule, layout, data),
            (of_columns("weight_scale"),) if rule.scaled else (),
            offsets=(of_columns("weight_bias"),) if rule.scaled else (),
            column_order=order,
            origin=origin_of(self.header, module, "indices"),
            codebooks=self._codebooks(module, rule, data),
        )

    # ---- sizes

    def _rule(self, module: StoredModule) -> _Rule:
        names = (module.stored, module.stored.rpartition(".")[2])
        found = next((self.rules[name] for name in names if name in self.rules), None)
        if found is None and self.common is not None:
            found = self._counted(module, self.common)
        if found is None:
            raise LowbitError("E0212", f"{self.place} has no sizes for {module.stored!r} (config_for_layers)")

        def number(key: str, least: int, value: object) -> int:
            if type(value) is not int or not least <= value <= 1 << 20:
                raise LowbitError(
                    "E0212",
                    f"{self.place}: {key} of {module.stored!r} must be a whole number from {least}, found "
                    f"{printable(repr(value))}",
                )
            return value

        def pair(key: str) -> tuple[int, int]:
            value = found.get(key)
            if not isinstance(value, list) or len(value) != 2:
                value = [None, None]
            return number(f"{key}[0]", -1, value[0]), number(f"{key}[1]", -1, value[1])

        vectors, centroids, residual = (
            pair(key) for key in ("vector_lens", "num_centroids", "num_res_centroids")
        )
        outliers = vectors[0] > 1 and centroids[0] > 0
        if outliers and residual[0] > 0:
            raise LowbitError(
                "E0218", f"{self.place}: outliers of {module.stored!r} have a second codebook, not read"
            )
        return _Rule(
            books=number("group_num", 1, found.get("group_num")),
            width=number("group_size", 1, found.get("group_size")),
            vector=number("vector_lens[1]", 1, vectors[1]),
            centroids=number("num_centroids[1]", 2, centroids[1]),
            residual=max(0, residual[1]),
            outliers=number("outlier_size", 0, found.get("outlier_size", 0)) if outliers else 0,
            outlier_vector=vectors[0],
            outlier_centroids=centroids[0],
            permuted=found.get("enable_perm", True) is True,
            scaled=found.get("enable_norm", True) is True,
        )

    def _counted(self, module: StoredModule, said: dict[str, object]) -> dict[str, object]:
        """GPTQModel's sizes for all modules, of this one: its groups and outliers as the tool counts them."""
        share, columns, where = (
            said.get("npercent", 0.0),
            module.shape[1],
            f"{self.place}: of {module.stored!r}",
        )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 100:
            raise LowbitError(
                "E0212", f"{where} npercent must be a number from 0 to 100, found {printable(repr(share))}"
            )
        size, books = said.get("group_size", -1), said.get("group_num", -1)
        if type(size) is not int or type(books) is not int or -1 not in (size, books) or 0 in (size, books):
            raise LowbitError(
                "E0212",
                f"{where} group_size and group_num must be -1 or positive, one of them -1, found "
                f"{printable(repr(size))} and {printable(repr(books))}",
            )
        if said.get("enable_norm") is True and said.get("norm_dim", 0) != 0:
            raise LowbitError(
                "E0218",
                f"{where} norm_dim is {printable(repr(said.get('norm_dim')))}: scales of rows are not read; "
                "quantize it with norm_dim 0",
            )
        outliers = math.ceil(share / 100 * columns)
        rest = columns - outliers
        if books > 0:
            outliers += rest % books if share else 0
            size = -(-(columns - outliers) // books)
        elif size > 0:
            books = -(-rest // size)
        else:
            size, books = rest, 1
        return said | {"group_size": size, "group_num": books, "outlier_size": outliers}

    def _checked(self, module: StoredModule) -> tuple[TensorEntry, _Rule]:
        """The main codebook and the sizes; dtypes and shapes of all tensors checked."""
        refuse_stack(module, "VPTQ's codes")
        rule, (out, columns) = self._rule(module), module.shape
        floats, header = tuple(DENSE_DTYPES), self.header

        def check(suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> TensorEntry:
            entry = entry_of(header, module, suffix, dtypes, _WHAT)
            check_shape(entry, shape, f"{_WHAT} of {out} x {columns} by {self.place}")
            return entry

        books = check("centroids.weight", floats, (rule.books, rule.centroids * rule.vector))
        if rule.outliers + rule.books * rule.width != columns:
            raise LowbitError(
                "E0213",
                f"{books.file.name}: {module.stored!r} has {columns} columns, but {self.place} says "
                f"{rule.outliers} outliers and {rule.books} groups of {rule.width}; correct the config",
            )
        main, second = rule.bits
        words = -(-rule.width * (main + second) // 32)
        check("indices", ("I32",), (rule.books, -(-out // rule.vector), words))
        if rule.residual:
            check("res_centroids.weight", floats, (rule.books, rule.residual * rule.vector))
        if rule.outliers:
            check(
                "outlier_centroids.weight", (books.dtype,), (1, rule.outlier_centroids * rule.outlier_vector)
            )
            rows = -(-out // rule.outlier_vector)
            check("outlier_indices", ("I16", "U16", "I32"), (1, rows, rule.outliers))
        if rule.permuted:
            check("perm", ("I16", "U16", "I32", "I64"), (columns,))
        for suffix in ("weight_scale", "weight_bias") if rule.scaled else ():
            check(suffix, floats, (columns,))
        return books, rule

    # ---- numbers

    def _floats(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        name = module.tensor(suffix)
        return finite_scales(self.header, name, data.tensor(name))

    def _numbers(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        """int64: what numbers say, of 16 bits without a sign."""
        stored = data.tensor(module.tensor(suffix))
        return stored.long() & 0xFFFF if stored.itemsize == 2 else stored.long()

    def _codebooks(self, module: StoredModule, rule: _Rule, data: TensorData) -> Tensor:
        """(books, centroids and residual ones, vector)."""
        names = ["centroids.weight"] + ["res_centroids.weight"] * (rule.residual > 0)
        parts = [self._floats(module, name, data).view(rule.books, -1, rule.vector) for name in names]
        return torch.cat(parts, 1)

    def _codes(self, module: StoredModule, rule: _Rule, layout: RowVectorLayout, data: TensorData) -> Tensor:
        """uint8 (vectors, bytes), as ``RowVectorLayout`` has them."""
        (out, columns), (main, second) = module.shape, rule.bits
        stored = data.tensor(module.tensor("indices"))
        codes = torch.empty(stored.shape[1], layout.row_bytes(columns), dtype=torch.uint8)
        if rule.outliers:
            numbers = self._outliers(module, rule, data)[:out]
            padded = torch.nn.functional.pad(numbers, (0, 0, 0, len(codes) * rule.vector - out))
            cells = padded.view(len(codes), rule.vector, rule.outliers).transpose(1, 2)
            codes[:, : layout.outlier_bytes] = cells.reshape(len(codes), -1).view(torch.uint8)
        width = rule.width * sum(layout.index_bytes)
        step = max(1, _SLICE // (rule.width * (main + second)))
        for number in range(rule.books):
            at = layout.outlier_bytes + number * width
            for start in range(0, len(codes), step):
                index = _indices(stored[number, start : start + step], rule.width, main + second)
                first = index & ((1 << main) - 1)
                self._check(module, first, rule.centroids, "indices")
                self._check(module, index >> main, max(1, rule.residual), "indices")
                counts = layout.index_bytes
                parts = [first >> 8 * byte for byte in range(counts[0])]
                parts += [index >> main + 8 * byte for byte in range(counts[1])]
                taken = torch.stack([part & 0xFF for part in parts], -1).to(torch.uint8)
                codes[start : start + step, at : at + width] = taken.flatten(1)
        return codes

    def _outliers(self, module: StoredModule, rule: _Rule, data: TensorData) -> Tensor:
        """(rows of whole vectors, outliers)."""
        index = self._numbers(module, "outlier_indices", data)[0]
        self._check(module, index, rule.outlier_centroids, "outlier_indices")
        table = self._floats(module, "outlier_centroids.weight", data)
        vectors = table.view(rule.outlier_centroids, rule.outlier_vector)[index]
        return vectors.transpose(1, 2).reshape(-1, rule.outliers)

    def _check(self, module: StoredModule, index: Tensor, count: int, suffix: str) -> None:
        low, high = int(index.min()), int(index.max())
        if high >= count or low < 0:
            name = module.tensor(suffix)
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} holds index {low if low < 0 else high} of "
                f"a codebook of {count}; the file is damaged, or its sizes in {self.place} are wrong",
            )

    def _order(self, module: StoredModule, data: TensorData) -> Tensor:
        """int64 (in,): the input's column of each stored one."""
        name, order = module.tensor("perm"), self._numbers(module, "perm", data)
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} is no permutation of {len(order)} columns; "
                "the file is damaged",
            )
        return order


def _indices(words: Tensor, width: int, bits: int) -> Tensor:
    """int64 (vectors, width): numbers of ``bits`` bits, one after another from the lowest."""
    fields = unpack_words(words, 1, width * bits).view(-1, width, bits)
    return (fields.long() << torch.arange(bits)).sum(-1)


FORMAT = Vptq
