"""HIGGS checkpoints (Malinovskii et al., 2024) as transformers saves them: codes of the best grid for normal
numbers, of single ones or of two neighbours, in FLUTE's order, of weights under a block Hadamard transform.

    weight   I16 [out * bits / 16, in]        codes, see ``flute_order``
    scales   F16, BF16 [out, in / group_size]
    tables   [2^bits]                         the grid, where p is 1; where it is 2 just 0, 1, 2 …
    tables2  [2^bits, 2^bits, 2]              what a pair of codes is worth; of p = 1 each number of its own

    weight[o, 2k + i] = tables2[code[o, 2k], code[o, 2k + 1], i] * scales[o, (2k + i) // group_size]
    y = (x H) weight^T,  H: Hadamard matrices of order hadamard_size over its root, along the diagonal

Which order the codes have is in config.json (``tune_metadata``: each module's template) or, in files from
before transformers 4.50, follows from a tensor ``num_sms_packed`` beside them. Pairs of codes stay together,
as indices of codebooks: of 2 bits two pairs, of 3 bits one in a byte.

transformers saves the bits of ``tables2`` as F16 whatever they are; where scales are BF16 so are those
numbers. Which they are shows: half of a grid's numbers are below 0.4 to 1 in size, read as the other type
below 0.005 or above 1.7. Its layers leave a bias out; it is added here. Inputs are rotated in float32, by its
GPU kernels in 16 bits. Inputs whose number hadamard_size does not divide are padded by the tool, which cannot
load such a file itself: refused.

Packed by FLUTE's and transformers' own Python on a CPU; what their GPU kernels compute was not seen.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

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
    flute_order,
    require_tensors,
)
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.matching import spellings
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.numerics.number_formats import NumberFormat, number_format, vector_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import RotationScheme, Scheme

_HALVES = ("F16", "BF16")
_WHAT = "a HIGGS layer"
_MIDDLE = (0.1, 1.55)  # of the sizes of a grid's numbers
_OWN = ("weight", "scales", "tables", "tables2")
_ALLOWED = {"bits": (2, 3, 4), "p": (1, 2), "group_size": (64, 128, 256)}


class Higgs(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "higgs"
    reference: ClassVar[str] = "transformers"
    sign: ClassVar[str] = "tables2"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        told = {key: self._whole(found.values, key) for key in (*_ALLOWED, "hadamard_size")}
        for key, allowed in _ALLOWED.items():
            if told[key] not in allowed:
                raise LowbitError(
                    "E0212",
                    f"{self.place}.{key} must be {', '.join(map(str, allowed))}, found {told[key]}",
                )
        self.bits, self.dimensions, self.group = (told[key] for key in _ALLOWED)
        self.size = told["hadamard_size"]
        if self.size % self.group or self.size & (self.size - 1):
            raise LowbitError(
                "E0212",
                f"{self.place}.hadamard_size must be a power of two that group_size {self.group} divides, "
                f"found {self.size}",
            )
        templates = found.values.get("tune_metadata") or {}
        if not isinstance(templates, dict):
            raise LowbitError("E0212", f"{self.place}.tune_metadata must be an object")
        self.templates: dict[str, object] = templates
        require_tensors(header, (".tables2",), self.place, self.name)
        self._rotation = Rotation.hadamard(self.size)

    def describe(self) -> str:
        """Bits, grid and the transform's size."""
        where = self.place.split(":")[0]
        grid = "pairs" if self.dimensions == 2 else "single numbers"
        return f"higgs, {self.bits}-bit grid of {grid}, group {self.group}, hadamard {self.size} in {where}"

    def _whole(self, values: dict[str, object], key: str) -> int:
        value = values.get(key)
        if type(value) is not int or not 1 <= value <= 1 << 15:
            raise LowbitError(
                "E0212",
                f"{self.place}.{key} must be a whole number from 1 to {1 << 15}, found "
                f"{printable(repr(value))}",
            )
        return value

    @property
    def _format(self) -> NumberFormat:
        """Of indices of pairs, or of two pairs where these are of 2 bits."""
        return vector_format(1, 8, 4) if self.bits == 2 else vector_format(1, 2 * self.bits, 2)

    def _scheme(self, module: StoredModule) -> Scheme:
        """Vectors under scales of groups, and the input's transform."""
        scales = self._check(module)
        return Scheme(
            self._format,
            ((1, self.group),),
            (number_format(DENSE_DTYPES[scales.dtype]),),
            rotation=RotationScheme("hadamard", self.size),
        )

    def _tensors(self, module: StoredModule) -> list[str]:
        """Codes, scales and both tables; and what says their order in old files."""
        names = [module.tensor(suffix) for suffix in _OWN]
        packed = module.tensor("num_sms_packed")
        return names + [packed] * (packed in self.header.tensors)

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The codes in rows, the pairs they name as a codebook."""
        scheme, tile = self.scheme_of(module), self._tile(module, data)
        words = data.tensor(module.tensor("weight"))
        codes = flute_order.pairs(words, self.bits, tile)  # (out, in / 2)
        scales = finite_scales(self.header, module.tensor("scales"), data.tensor(module.tensor("scales")))
        book = self._pairs(module, data, scales.dtype).flatten(0, 1)  # (4^bits, 2)
        if self.bits == 2:
            codes = codes[:, 0::2] << 4 | codes[:, 1::2]
            book = torch.cat((book.repeat_interleave(16, 0), book.repeat(16, 1)), 1)
        origin = origin_of(self.header, module)
        return QuantizedTensor(
            scheme, module.shape, codes, (scales,), origin=origin, codebooks=book.unsqueeze(0).contiguous()
        )

    def _input(self, module: StoredModule, data: TensorData) -> InputRule:
        """What rotates it."""
        return InputRule(rotation=self._rotation)

    def _pairs(self, module: StoredModule, data: TensorData, dtype: torch.dtype) -> Tensor:
        """``tables2`` in the type of its numbers (2^bits, 2^bits, 2); E0215 where it is no grid's."""
        name = module.tensor("tables2")
        stored = data.tensor(name)
        readings = [stored.view(dtype), stored]
        middles = [float(reading.float().abs().median()) for reading in readings]
        likely = [i for i, middle in enumerate(middles) if _MIDDLE[0] <= middle <= _MIDDLE[1]]
        if not likely:
            raise LowbitError(
                "E0215",
                f"{self.header.file_of(name)}: tensor {name!r} is no grid of normal numbers: half are below "
                f"{middles[0]:.3g} in size, not {_MIDDLE[0]} to {_MIDDLE[1]}; the file is damaged or was "
                "saved in another dtype than its numbers have; download it again",
            )
        book = finite_scales(self.header, name, readings[likely[0]])
        if self.dimensions == 1:
            single = data.tensor(module.tensor("tables"))
            alone = torch.stack(torch.meshgrid(single, single, indexing="ij"), -1)
            if not torch.equal(alone.float(), book.float()):
                raise LowbitError(
                    "E0213",
                    f"{self.header.file_of(name)}: tensor {name!r} is not each number of "
                    f"{module.tensor('tables')!r} with each, as {self.place}.p 1 has it. Config and weights "
                    "are from different models",
                )
        return book

    def _tile(self, module: StoredModule, data: TensorData) -> int:
        """TileP of the template that the module was packed for."""
        key = next((name for name in spellings(module.stored) if name in self.templates), None)
        out = module.shape[0]
        if key is None:
            name = module.tensor("num_sms_packed")
            if name not in self.header.tensors:
                raise LowbitError(
                    "E0212",
                    f"{self.place}.tune_metadata has no {module.stored!r}, and no tensor num_sms_packed lies "
                    "beside its weight: which of FLUTE's orders its codes have is said nowhere; restore the "
                    "config.json that was saved with these weights",
                )
            packed = data.tensor(name).flatten().tolist()
            if packed not in [[count] for count in flute_order.PROCESSORS]:
                raise LowbitError(
                    "E0218",
                    f"{self.header.file_of(name)}: tensor {name!r} is {packed}; FLUTE's order is known for "
                    f"GPUs of {', '.join(map(str, flute_order.PROCESSORS))} processors",
                )
            tile, told = flute_order.TILE, f"tensor {name!r}"
        else:
            place = f"{self.place}.tune_metadata.{printable(key)}"
            tile, told = self._tile_of_template(place, self.templates[key], module), place
        together = flute_order.rows_together(self.bits, tile)
        if out % together:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(module.tensor('weight'))}: {module.stored!r} has {out} rows; {told} "
                f"packs {together} together. Config and weights are from different models",
            )
        return tile

    def _tile_of_template(self, place: str, values: object, module: StoredModule) -> int:
        out, columns = module.shape
        if not isinstance(values, dict):
            raise LowbitError("E0212", f"{place} must be an object, found {type(values).__name__}")
        wanted = {"N": out, "K": columns, "num_bits": self.bits, "group_size": self.group}
        for key, value in wanted.items():
            if values.get(key) != value:
                raise LowbitError(
                    "E0212",
                    f"{place}.{key} is {printable(repr(values.get(key)))}, the module has {value}; config "
                    "and weights are from different models",
                )
        template, count = values.get("template_id"), flute_order.templates(self.bits)
        if type(template) is not int or not 0 <= template < count:
            raise LowbitError(
                "E0218",
                f"{place}.template_id is {printable(repr(template))}; the order of FLUTE's templates 0 to "
                f"{count - 1} of {self.bits} bits is known",
            )
        tile = flute_order.tile_of(self.bits, template)
        if self.bits == 3 and tile != flute_order.TILE:
            raise LowbitError(
                "E0218",
                f"{place}.template_id is {template}, of tiles of {tile}; FLUTE packs 3 bits in tiles of "
                f"{flute_order.TILE} only",
            )
        return tile

    def _check(self, module: StoredModule) -> TensorEntry:
        """That every tensor is there in the size the config says; the scales'."""
        refuse_stack(module, "FLUTE's packing")
        out, columns = module.shape
        what = f"{_WHAT} of {out} x {columns}, {self.bits} bits in groups of {self.group},"
        weight = entry_of(self.header, module, "weight", ("I16",), what)
        if columns % self.size:
            padded = -(-columns // self.size) * self.size
            raise LowbitError(
                "E0218",
                f"{weight.file.name}: {module.name} has {columns} inputs, which HIGGS pads to {padded} for "
                f"transforms of {self.size}; that is not done here, nor does transformers load such a file",
            )
        check_shape(weight, (out * self.bits // 16, columns), what)
        scales = entry_of(self.header, module, "scales", _HALVES, what)
        check_shape(scales, (out, columns // self.group), what)
        size = 1 << self.bits
        check_shape(entry_of(self.header, module, "tables", _HALVES, what), (size,), what)
        check_shape(entry_of(self.header, module, "tables2", _HALVES, what), (size, size, 2), what)
        return scales


FORMAT = Higgs
