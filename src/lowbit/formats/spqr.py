"""SpQR checkpoints (Dettmers et al., 2023): 3-bit codes whose scales are codes too, and outliers beside them.

As transformers saves them:

    dense_weights  I64 [out in / 16]    16 columns of a row in a word; tiles of 16 x 16 lie along the rows of
                                        tiles, a tile's 16 words one after another
    row_offsets    I32 [out + 1]        the first outlier of each row, or
                   I32 [out / 16 + 1]   of each 16 rows, whose outlier number j is of row j mod 16
    col_vals       I32 [outliers]       column in the low half, F16 value in the high; F32 [0] where none are
    in_perm        I32 [in / 2]         the input column of each stored one, two a word, the low half first

A word holds, from its lowest bit, the code of the scale, of the zero point and of 16 weights, 3 bits each,
then in row k of a tile the tile's byte k / 2. These eight bytes are four F16: the scale of the scales, the
scale of the zero points, the zero point of the scales, the zero point of the zero points. With every
difference and product rounded to 16 bits, outliers added in float32 and the sum rounded,

    scale = scale of the scales * (code - zero point of the scales)         and the zero point likewise
    weight[r, c] = scale * (code - zero point) + outlier

There is no other layout (bits 3, beta1 and beta2 16). Scales and zero points are kept as the F16 they are
worth, so that rows do without each other: 5 bits a weight in place of the file's 4, and 32 an outlier as
there. The tool's converter leaves ``architectures`` of config.json empty: whoever converts so names the
model's class there.
"""

from __future__ import annotations

from dataclasses import replace
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
from lowbit.numerics.quantized_tensor import Outliers, QuantizedTensor
from lowbit.numerics.scheme import Scheme

_NUMBERS = {"bits": 3, "beta1": 16, "beta2": 16}
_TILE = 16
_SLICE = 1 << 21  # weights that are looked at together
_WHAT = "an SpQR weight"


class Spqr(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "spqr"
    reference: ClassVar[str] = "spqr"
    sign: ClassVar[str] = "dense_weights"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        for key, only in _NUMBERS.items():
            value = found.values.get(key, only)
            if type(value) is not int or value != only:
                raise LowbitError(
                    "E0212",
                    f"{self.place}.{key} must be {only}, the one layout there is of SpQR; found "
                    f"{printable(repr(value))}",
                )
        shapes = found.values.get("shapes") or {}
        if not isinstance(shapes, dict):
            raise LowbitError("E0212", f"{self.place}.shapes must map tensors to their sizes")
        self.shapes: dict[str, object] = shapes
        require_tensors(header, (".dense_weights",), self.place, self.name)

    def describe(self) -> str:
        """What a weight and an outlier cost."""
        kept = "5 bits a weight and 32 an outlier on a CPU, 48 on a GPU"
        return f"spqr, 3-bit in {self.place.split(':')[0]}, {kept}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """3-bit codes, F16 scales and zero points of 16 columns, F16 outliers."""
        _, _, entries, *order = self._checked(module)
        half, (out, columns) = number_format("f16"), module.shape
        return Scheme(
            number_format("uint3"),
            ((1, _TILE),),
            (half,),
            "float",
            reordered=bool(order),
            outliers=half,
            outlier_share=entries.shape[0] / (out * columns),
        )

    def _tensors(self, module: StoredModule) -> list[str]:
        """Everything of the layer."""
        return [entry.name for entry in self._checked(module)]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes as they are, scales and zero points made of theirs."""
        words, offsets, entries, *order = self._checked(module)
        (out, columns), across = module.shape, module.shape[1] // _TILE
        stored = data.tensor(words.name).view(-1, across, _TILE)
        codes = torch.empty(out, columns, dtype=torch.uint8)
        numbers = torch.empty(2, out, across, dtype=torch.float16)
        step = max(1, _SLICE // columns // _TILE)
        for start in range(0, len(stored), step):
            part, rows = stored[start : start + step], slice(start * _TILE, (start + step) * _TILE)
            if bool((_shared_bytes(part) < 0).any()):
                raise self._damaged(
                    words,
                    "holds tiles whose rows disagree about the tile's scales, or bits that mean nothing; the "
                    "file is damaged, download it again",
                )
            codes[rows], numbers[:, rows] = decode(part)
        scales, zeros = finite_scales(self.header, words.name, numbers)
        weight = QuantizedTensor(
            self._scheme(module),
            module.shape,
            codes,
            (scales,),
            zeros,
            origin=origin_of(self.header, module, "dense_weights"),
            outliers=self._outliers(module, offsets, entries, data),
        )
        for start in range(0, out, step * _TILE):
            part = weight.rows(start, min(start + step * _TILE, out)).dequantize()
            finite_scales(self.header, words.name, part)
        return replace(weight, column_order=self._order(order[0], data)) if order else weight

    def _damaged(self, entry: TensorEntry, what: str) -> LowbitError:
        return LowbitError("E0213", f"{entry.file.name}: tensor {entry.name!r} {what}")

    # ---- sizes

    def _checked(self, module: StoredModule) -> list[TensorEntry]:
        """Words, offsets, outliers and, where there is one, the order; dtypes and shapes checked."""
        refuse_stack(module, "SpQR's codes")
        out, columns = module.shape
        if out % _TILE or columns % _TILE:
            raise LowbitError(
                "E0218",
                f"{module.name} is {out} x {columns}, no whole number of SpQR's tiles of {_TILE} x {_TILE}; "
                "the tool's own kernels read no such file, use another version of the model",
            )
        what = f"{_WHAT} of {out} x {columns}"
        words = entry_of(self.header, module, "dense_weights", ("I64",), what)
        check_shape(words, (out * columns // _TILE,), what)
        offsets = entry_of(self.header, module, "row_offsets", ("I32",), what)
        if offsets.shape not in ((out + 1,), (out // _TILE + 1,)):
            raise self._damaged(
                offsets,
                f"is {offsets.dtype} {list(offsets.shape)}; {what} stores [{out + 1}] or "
                f"[{out // _TILE + 1}]. Config and weights are from different models",
            )
        entries = entry_of(self.header, module, "col_vals", ("I32", "F32"), what)
        if len(entries.shape) != 1 or (entries.dtype == "F32" and entries.shape != (0,)):
            raise self._damaged(
                entries,
                f"is {entries.dtype} {list(entries.shape)}; {what} stores I32 [outliers] or F32 [0]. The "
                "file is damaged or of another tool",
            )
        found = [words, offsets, entries]
        if self._has_order(module):
            order = entry_of(self.header, module, "in_perm", ("I32",), what)
            check_shape(order, (columns // 2,), what)
            found.append(order)
        for entry in found:
            told = self.shapes.get(f"{entry.name}.shape", entry.shape[0])
            if told != entry.shape[0] and told != list(entry.shape):
                raise self._damaged(
                    entry,
                    f"is {entry.dtype} {list(entry.shape)}, but {self.place}.shapes says "
                    f"{printable(repr(told))}; config and weights are from different models",
                )
        return found

    def _has_order(self, module: StoredModule) -> bool:
        """By the file or by the config: without its order a layer is another one."""
        name = module.tensor("in_perm")
        entry = self.header.tensors.get(name)
        told = self.shapes.get(f"{name}.shape") not in (None, 0, [0])
        return told or (entry is not None and entry.shape != (0,))

    # ---- numbers

    def _outliers(
        self, module: StoredModule, offsets: TensorEntry, entries: TensorEntry, data: TensorData
    ) -> Outliers:
        """Those that are no filling."""
        out, columns = module.shape
        first, count = data.tensor(offsets.name).long(), entries.shape[0]
        many = first.diff()
        if int(first[0]) != 0 or int(first[-1]) != count or bool((many < 0).any()):
            raise self._damaged(
                offsets,
                f"must rise from 0 to the {count:,} outliers of {entries.name!r}; it holds {int(first[0])} "
                f"to {int(first[-1])} and falls {int((many < 0).sum())} times. The file is damaged, download "
                "it again",
            )
        if len(many) == out:
            rows = torch.arange(out).repeat_interleave(many)
        elif bool((many % _TILE != 0).any()):
            raise self._damaged(
                offsets,
                f"must be multiples of {_TILE}, an outlier for each of {_TILE} rows; download it again",
            )
        else:
            rows = torch.arange(len(many)).repeat_interleave(many) * _TILE + torch.arange(count) % _TILE
        stored = data.tensor(entries.name).int().contiguous().view(torch.int16).view(count, 2)
        places = stored[:, 0].long() & 0xFFFF
        values = finite_scales(self.header, entries.name, stored[:, 1].contiguous().view(torch.float16))
        if count and int(places.max()) >= columns:
            raise self._damaged(
                entries,
                f"holds column {int(places.max())} of {columns}; the file is damaged, download it again",
            )
        used = (values != 0).nonzero().flatten()  # the rest fills up the shorter of 16 rows
        at, order = (rows * columns + places)[used].sort()
        if bool((at.diff() == 0).any()):
            raise self._damaged(
                entries, "holds two outliers of one weight; the file is damaged, download it again"
            )
        return Outliers.of(at // columns, at % columns, values[used[order]], out)

    def _order(self, entry: TensorEntry, data: TensorData) -> Tensor:
        """int64 (in,): the input's column of each stored one."""
        order = data.tensor(entry.name).contiguous().view(torch.int16).long() & 0xFFFF
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise self._damaged(
                entry, f"is no permutation of {len(order)} columns; the file is damaged, download it again"
            )
        return order


def _shared_bytes(words: Tensor) -> Tensor:
    """int64 (R, C, 8) of tiles (R, C, 16): the byte above the codes that two rows share; -1 where not."""
    pairs = (words >> 54).unflatten(-1, (8, 2))
    same = (pairs[..., 0] == pairs[..., 1]) & (pairs[..., 0] < 256)  # the highest bit makes it negative
    return torch.where(same, pairs[..., 0], -1)


def decode(words: Tensor) -> tuple[Tensor, Tensor]:
    """Of tiles (R, C, 16): codes uint8 (16 R, 16 C), and F16 (2, 16 R, C), scales and zero points."""
    second = _shared_bytes(words).to(torch.uint8).view(torch.float16).unsqueeze(-2)  # (R, C, 1, 4)
    codes = (words.unsqueeze(-1) >> torch.arange(0, 54, 3) & 7).transpose(1, 2).flatten(0, 1)  # (16 R, C, 18)
    first = codes[..., :2].unflatten(0, (-1, _TILE)).to(torch.float16)  # (R, 16, C, 2)
    second = second.transpose(1, 2)  # (R, 1, C, 4)
    numbers = second[..., :2] * (first - second[..., 2:])
    return codes[..., 2:].flatten(1).to(torch.uint8), numbers.flatten(0, 1).permute(2, 0, 1)


FORMAT = Spqr
