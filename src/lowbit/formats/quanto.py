"""optimum-quanto checkpoints: every QLinear's weight taken apart into ``weight._data`` and its fellows.

    qint8, qfloat8…   weight._data        I8, F8_E4M3, F8_E5M2, F8_E4M3FNUZ [out, in]; weight._scale [out, 1],
                                          of one row []
    qint4, qint2      weight._data._data  U8, codes in slabs; weight._scale, weight._shift [n / g, 1]

    qint8, qfloat8    weight = data * scale
    qint4, qint2      weight = code * scale - shift, where the shift is a float
                      weight = (code - shift) * scale, where it is an integer

Codes of few bits are a matrix (n / g, g) of groups of g weights of a row (a row where it is short), packed
along its first dimension in as many slabs as fit a byte, the first lowest: of 4 bits
byte[r] = code[r] | code[r + R] << 4, of 2 bits code[r] | code[r + R] << 2 | …; the rows are padded to whole
bytes.

``quanto_qmap.json`` (``quantization_map.json``) has the types of weights and activations, by module;
transformers' ``quant_method: quanto`` has them once. Of weights everything needed is in the tensors; where
they are of another type than the map says they win, with a warning. ``input_scale`` and ``output_scale`` are
one number each, 1 and unused unless activations are quantized. If so, x becomes Q(x / input_scale) and what
the layer gives, bias included, Q(y / output_scale), each to the nearest code of the activations' type and
times its scale: a model that quanto has loaded rounds all outputs, also those of which its calibration had
found that nobody needs them rounded. What a LayerNorm gives is rounded, too; that is refused, and so are
scales without a map, which alone says to what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    require_tensors,
)
from lowbit.formats.dense import DENSE_DTYPES, origin_of
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_by_tensors, quantization_config
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_BYTES = {"I8": "int8", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz"}
_TYPES = {
    "qint8": "int8",
    "qint4": "uint4",
    "qint2": "uint2",
    "qfloat8": "e4m3",
    "qfloat8_e4m3fn": "e4m3",
    "qfloat8_e5m2": "e5m2",
    "qfloat8_e4m3fnuz": "e4m3fnuz",
    "none": "",
}
_TRANSFORMERS = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "float8": "qfloat8"}
_DATA = ("weight._data", "weight._data._data")
_SCALES = ("input_scale", "output_scale")
_WHAT = "quanto"


@dataclass(frozen=True)
class Layout:
    """``code``: the number format; ``size``: weights of a group of few bits; ``integer``: its shift is "
    "one."""

    code: str
    scale: str
    size: int = 0
    integer: bool = False

    @property
    def few(self) -> bool:
        return self.code.startswith("uint")

    def scheme(self, columns: int) -> Scheme:
        blocks = ((1, self.size if self.few and self.size != columns else 0),)
        zero, offset = ("integer", False) if self.integer else ("none", self.few)
        code, scales = number_format(self.code), (number_format(self.scale),)
        if zero == "integer":
            return Scheme(code, blocks, scales, "integer")
        return Scheme(code, blocks, scales, offset=offset)


class Quanto(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "quanto"
    reference: ClassVar[str] = "optimum-quanto"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = quantization_config(header)
        self.place = "" if found is None else found.place
        self.types: dict[str, str] = {}
        self.every = ""
        self.activations: dict[str, str] = {}
        self.every_activation = ""
        if found is None:
            return
        if "quant_method" in found.values:
            self.every = self._type(found.values.get("weights", "int8"), "weights", _TRANSFORMERS)
            self.every_activation = self._activation(found.values.get("activations"), "", _TRANSFORMERS)
        else:
            for name, said in found.values.items():
                if not isinstance(said, dict):
                    raise LowbitError(
                        "E0212",
                        f"{self.place}: {printable(repr(name))} must have weights and activations, found "
                        f"{printable(repr(said))}",
                    )
                self.types[name] = self._type(said.get("weights", "none"), name, {})
                self.activations[name] = self._activation(said.get("activations", "none"), name, {})
                if self.activations[name] and not self.types[name]:
                    raise LowbitError(
                        "E0218",
                        f"{self.place}: {printable(repr(name))} has activations "
                        f"{printable(repr(said.get('activations')))} and no quantized weights: quanto rounds "
                        "what such a norm gives, which is not supported; quantize the model again and "
                        "exclude its norms",
                    )
        require_tensors(header, _DATA, found.place, self.name)

    def _type(self, told: object, name: str, short: dict[str, str]) -> str:
        """The number format of a qtype's name; "" for none."""
        known = short.get(told, told) if isinstance(told, str) else told
        if not isinstance(known, str) or known not in _TYPES or (short and told not in short):
            raise LowbitError(
                "E0212",
                f"{self.place}: {printable(repr(name))}: weights must be one of "
                f"{', '.join(short or _TYPES)}, found {printable(repr(told))}",
            )
        return _TYPES[known]

    def _activation(self, told: object, name: str, short: dict[str, str]) -> str:
        """The number format that activations are rounded to; "" for none."""
        words = short or {kind: kind for kind in _TYPES}
        kinds = {word: _TYPES[kind] for word, kind in words.items() if _TYPES[kind] in _BYTES.values()}
        if told in (None, "none"):
            return ""
        if isinstance(told, str) and told in kinds:
            return kinds[told]
        of = f"{printable(repr(name))}: " if name else ""
        raise LowbitError(
            "E0212",
            f"{self.place}: {of}activations must be one of {', '.join(kinds)} or none, found "
            f"{printable(repr(told))}",
        )

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """A map of quanto's, a quant_method, or its tensors."""
        if header.container != "safetensors":
            return None
        return claimed_by_tensors(header, _DATA, cls.name)

    def describe(self) -> str:
        """The types of weights that the map names."""
        told = sorted({kind for kind in (*self.types.values(), self.every) if kind})
        return f"quanto, {' and '.join(told)} in {self.place}" if told else "quanto, told by the tensors"

    def _is_dense(self, module: StoredModule) -> bool:
        return self._data(module) is None

    def _scheme(self, module: StoredModule) -> Scheme:
        """From dtypes and shapes; what activations are rounded to from the map."""
        scheme, kind = self._layout(module).scheme(module.shape[1]), self._activation_of(module)
        if not kind:
            return scheme
        for suffix in _SCALES:
            entry = entry_of(self.header, module, suffix, tuple(DENSE_DTYPES), f"{_WHAT} with activations")
            if math.prod(entry.shape) != 1:
                check_shape(entry, (), f"{_WHAT} with activations")
        static = ActivationScheme(number_format(kind), (0, 0), "static")
        return replace(scheme, activation=static, output=static)

    def _tensors(self, module: StoredModule) -> list[str]:
        """What the weight was taken apart into."""
        parts = [module.tensor(f"weight.{part}") for part in ("_scale", "_shift")]
        return [self._codes(module).name, *(name for name in parts if name in self.header.tensors)]

    def _beside(self, module: StoredModule) -> list[str]:
        """The scales of activations."""
        return [name for suffix in _SCALES if (name := module.tensor(suffix)) in self.header.tensors]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked; scales and shifts as stored, a float shift with its sign turned."""
        stored = self._codes(module)
        layout, (out, columns) = self._layout(module), module.shape
        self._check_activations(module, data)
        raw = data.tensor(stored.name)
        codes = raw.view(torch.uint8)
        zeros: Tensor | None = None
        offsets: tuple[Tensor, ...] = ()
        if layout.few:
            bits = int(number_format(layout.code).bits)
            slabs = [codes >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
            codes = torch.cat(slabs)[: out * columns // layout.size].reshape(out, columns)
            name = module.tensor("weight._shift")
            shift = data.tensor(name)
            if layout.integer:
                zeros = self._zero_points(name, shift, bits).view(out, -1)
            else:
                offsets = (-finite_scales(self.header, name, shift).view(out, -1),)
        elif layout.code == "int8":
            codes = codes ^ 0x80
        else:
            finite_scales(self.header, stored.name, raw)
        name = module.tensor("weight._scale")
        scale = finite_scales(self.header, name, data.tensor(name)).view(out, -1)
        return QuantizedTensor(
            self._scheme(module),
            module.shape,
            codes,
            (scale,),
            zeros,
            offsets,
            origin=origin_of(self.header, module, "weight._scale"),
        )

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """The scale of the layer's inputs."""
        scale = self._of_activations(module, data, 0)
        return None if scale is None else InputRule(static_scale=scale)

    def _output_scale(self, module: StoredModule, data: TensorData) -> Tensor | None:
        """The scale of what the layer gives."""
        return self._of_activations(module, data, 1)

    def _of_activations(self, module: StoredModule, data: TensorData, which: int) -> Tensor | None:
        """A number that calibration found; 1 is what quanto starts from."""
        if not self._activation_of(module):
            return None
        name = module.tensor(_SCALES[which])
        scale = finite_scales(self.header, name, data.tensor(name)).float().reshape(())
        if float(scale) <= 0.0:
            raise LowbitError(
                "E0215",
                f"{self.header.file_of(name)}: tensor {name!r} is {float(scale):g}, and activations are "
                "divided by it, expected more than 0; the file is damaged, download it again",
            )
        if float(scale) == 1.0:
            self.notes.contradiction(
                "E0214",
                f"{self.header.file_of(name)}: tensor {name!r} is 1, as before any calibration, and "
                f"{self.place} says that activations are quantized; rounding to whole numbers, as quanto "
                "does",
            )
        return scale

    def _activation_of(self, module: StoredModule) -> str:
        return self.activations.get(module.stored, self.every_activation)

    def _codes(self, module: StoredModule) -> TensorEntry:
        data = self._data(module)
        assert data is not None, "a plain module is read elsewhere"
        return data

    def _data(self, module: StoredModule) -> TensorEntry | None:
        """The codes, None of a plain matrix."""
        names = [f"{module.stored}.{suffix}" for suffix in _DATA]
        found = next((self.header.tensors[name] for name in names if name in self.header.tensors), None)
        if found is not None and module.expert is not None:
            raise LowbitError(
                "E0218",
                f"{found.file.name}: {module.stored!r} is a stack of experts, which quanto does not "
                "quantize; use a version with a module for each expert",
            )
        return found

    def _layout(self, module: StoredModule) -> Layout:
        """From dtypes and shapes, checked; a map that says otherwise is noted."""
        data, (out, columns) = self._codes(module), module.shape
        scale = entry_of(self.header, module, "weight._scale", tuple(DENSE_DTYPES), _WHAT)
        if data.dtype != "U8":
            entry_of(self.header, module, data.name.removeprefix(f"{module.stored}."), tuple(_BYTES), _WHAT)
            check_shape(data, (out, columns), f"{_WHAT} with 8 bits")
            if out != 1 or scale.shape:  # one row has one number
                check_shape(scale, (out, 1), f"{_WHAT} with 8 bits")
            self._compare(module, _BYTES[data.dtype], data)
            return Layout(_BYTES[data.dtype], DENSE_DTYPES[scale.dtype])
        shift = entry_of(
            self.header,
            module,
            "weight._shift",
            (scale.dtype, "I8", "U8"),
            f"{_WHAT} with {scale.dtype} scales",
        )
        groups = scale.shape[0] if scale.shape else 0
        size = out * columns // groups if groups else 0
        whole = bool(size) and columns % size == 0 and groups * size == out * columns
        shapes = {bits: (-(-groups * bits // 8), size) for bits in (4, 2)}
        fits = [bits for bits, shape in shapes.items() if whole and data.shape == shape]
        told = self._told(module)
        bits = next((bits for bits in fits if told == f"uint{bits}"), fits[0] if fits else 0)
        if not bits:
            raise LowbitError(
                "E0213",
                f"{data.file.name}: tensor {data.name!r} is {list(data.shape)} and {scale.name!r} "
                f"{list(scale.shape)}; for {out} x {columns} weights quanto stores groups that divide a "
                "row, two or four codes to a byte. Config and weights are from different models",
            )
        what = f"{_WHAT} with groups of {size}"
        check_shape(scale, (groups, 1), what)
        check_shape(shift, (groups, 1), what)
        self._compare(module, f"uint{bits}", data)
        return Layout(f"uint{bits}", DENSE_DTYPES[scale.dtype], size, shift.dtype in ("I8", "U8"))

    def _told(self, module: StoredModule) -> str:
        """The number format the map has for the module; "" where it has none."""
        return self.types.get(module.stored, self.every)

    def _compare(self, module: StoredModule, code: str, data: TensorEntry) -> None:
        told = self._told(module)
        if self.place and told != code:
            says = told or "that it is not quantized"
            self.notes.contradiction(
                "E0214",
                f"{data.file.name}: {module.stored!r} is stored as {code}, {self.place} says {says}; reading "
                "it as it is stored",
            )

    def _check_activations(self, module: StoredModule, data: TensorData) -> None:
        """Without a map only the scales tell that activations are quantized."""
        for suffix in () if self.place else _SCALES:
            name = module.tensor(suffix)
            entry = self.header.tensors.get(name)
            if entry is None:
                continue
            if math.prod(entry.shape) != 1 or float(data.tensor(name).reshape(())) != 1.0:
                raise LowbitError(
                    "E0218",
                    f"{entry.file.name}: tensor {name!r} {list(entry.shape)} is not 1: activations are "
                    "quantized, and only a map says to what; restore quanto_qmap.json beside the weights",
                )

    def _zero_points(self, name: str, shift: Tensor, bits: int) -> Tensor:
        low, high = int(shift.min()), int(shift.max())
        if low < 0 or high >> bits:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} holds {low} to {high}; zero points of "
                f"{bits} bits are 0 to {(1 << bits) - 1}. The file is damaged",
            )
        return shift.to(torch.uint8)


FORMAT = Quanto
