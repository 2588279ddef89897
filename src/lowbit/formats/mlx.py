"""MLX checkpoints (Apple's mlx and mlx-lm), and the same layout under transformers' name for it, ``metal``.

    weight      U32 [out, in * bits / 32]    a little-endian bit stream along the row, the first code lowest
    scales      [out, in / g]                F32, F16 or BF16; U8 in the modes below
    biases      [out, in / g]                affine only; metal calls them ``qbiases``
    bias        [out]                        the layer's own

    mode    codes            g            scales
    affine  1-6 and 8 bits   32, 64, 128  any sign; weight = code * scale + bias
    mxfp4   e2m1             32           2^(byte - 127)
    mxfp8   e4m3             32           2^(byte - 127)
    nvfp4   e2m1             16           e4m3; a stack may have ``global_scale`` F32 [experts], over 6 * 448

Embeddings and the output head are quantized like Linears. Experts are stacks: ``switch_mlp.down_proj.weight``
[experts, out, …]. ``quantization`` in config.json (``quantization_config`` is its copy) has bits, group_size
and mode for all, and under the name of a module its own, or false. A module is quantized where it has
scales, and bits, group and mode follow from its tensors, as in mlx-lm; where a config says otherwise they
win, with a warning. Inputs stay as they are; ``quantize_input`` is refused.
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
from lowbit.formats.dense import DENSE_DTYPES, of_expert, origin_of
from lowbit.formats.matching import spellings
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, says_method
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# mode -> (bits, group, codes, scales)
FLOAT_MODES = {
    "mxfp4": (4, 32, "e2m1", "e8m0"),
    "mxfp8": (8, 32, "e4m3", "e8m0"),
    "nvfp4": (4, 16, "e2m1", "e4m3"),
}
MODES = ("affine", *FLOAT_MODES)
_LARGEST = 6.0 * 448.0  # of an e2m1 code times an e4m3 scale: what a global scale stands for


@dataclass(frozen=True)
class Rule:
    """What a config says of a module: 0 and "" where it says nothing. ``plain``: it is not quantized."""

    bits: int = 0
    group: int = 0
    mode: str = ""
    plain: bool = False

    def __str__(self) -> str:
        return f"{self.mode} {self.bits} bits, group {self.group}"


@dataclass(frozen=True)
class Layout:
    """How a module lies. ``scale``: the number format of its scales; ``outer``: whether there is one more."""

    rule: Rule
    scale: str
    outer: bool

    @property
    def scheme(self) -> Scheme:
        mode, blocks = self.rule.mode, ((1, self.rule.group),)
        if mode == "affine":
            code, scales = number_format(f"uint{self.rule.bits}"), (number_format(self.scale),)
            return Scheme(code, blocks, scales, offset=True)
        code, scales = number_format(FLOAT_MODES[mode][2]), (number_format(self.scale),)
        if self.outer:
            return Scheme(code, (*blocks, (0, 0)), (*scales, number_format("f32")))
        return Scheme(code, blocks, scales)


class Mlx(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "mlx"
    reference: ClassVar[str] = "mlx-lm"
    sign: ClassVar[str] = "scales"
    offsets: ClassVar[str] = "biases"
    what: ClassVar[str] = "MLX"
    bits: ClassVar[tuple[int, ...]] = AFFINE_BITS
    groups: ClassVar[tuple[int, ...]] = AFFINE_GROUPS  # (): any

    others: ClassVar[str] = "; mxfp4, mxfp8, nvfp4"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.place = found.place
        self.every = self._rule(found.values, "")
        self.rules = {
            name: self._rule(values, name)
            for name, values in found.values.items()
            if isinstance(values, bool | dict) and name != "dequantize"
        }
        require_tensors(header, (".scales",), found.place, self.name)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """``quantization``, or a quant_method of this name."""
        if header.container != "safetensors":
            return None
        return says_method(header, cls.name)

    def describe(self) -> str:
        """Bits and groups of all, and how many modules have their own."""
        own = f", {len(self.rules)} modules of their own" if self.rules else ""
        return f"{self.name}, {self.every}{own} in {self.place.split(':')[0]}"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From dtypes and shapes."""
        return self._layout(module).scheme

    def _tensors(self, module: StoredModule) -> list[str]:
        """Weight, scales, biases."""
        suffixes = ("weight", "scales", self.offsets, "global_scale")
        return [name for suffix in suffixes if (name := module.tensor(suffix)) in self.header.tensors]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked, scales and biases as stored."""
        layout = self._layout(module)
        entry = self.header.tensors[module.tensor("weight")]
        packed = of_expert(module, data.raw(entry.name).view(*entry.shape[:-1], 4 * entry.shape[-1]))
        scales = [self._numbers(module, "scales", data)]
        if layout.outer:
            stored = self._numbers(module, "global_scale", data).reshape(1, 1)
            scales.append(stored / _LARGEST)
        affine = layout.rule.mode == "affine"
        weight = QuantizedTensor(
            layout.scheme,
            module.shape,
            unpack_bits(packed, layout.rule.bits, module.shape[1]),
            tuple(scales),
            offsets=(self._numbers(module, self.offsets, data),) if affine else (),
            origin=origin_of(self.header, module),
        )
        if weight.scheme.weight.name == "e4m3":
            finite_scales(self.header, entry.name, weight.codes.view(torch.float8_e4m3fn))
        return weight

    # ---- what the config says

    def _rule(self, values: object, name: str) -> Rule:
        """The words of a module, or of all (``name`` ""); what is impossible is E0212."""
        if isinstance(values, bool):
            return Rule(plain=not values)
        assert isinstance(values, dict), "the caller looked"
        where = f"{self.place}: {printable(repr(name))}:" if name else f"{self.place}:"
        if values.get("quantize_input"):
            raise LowbitError(
                "E0218",
                f"{where} quantize_input is set, which is not supported; use a version whose inputs are not "
                "quantized, or a ModelOpt or compressed-tensors one",
            )
        mode = values.get("mode", "affine")
        if mode not in MODES:
            raise LowbitError(
                "E0212", f"{where} mode must be one of {', '.join(MODES)}, found {printable(repr(mode))}"
            )
        usual = FLOAT_MODES[mode][:2] if mode in FLOAT_MODES else (4, 64)
        found = []
        for key, default, known in (
            ("bits", usual[0], self.bits if mode == "affine" else usual[:1]),
            ("group_size", usual[1], self.groups if mode == "affine" else usual[1:]),
        ):
            told = default if values.get(key) is None else values[key]
            number = isinstance(told, int) and not isinstance(told, bool)
            if not number or (told not in known if known else told <= 0):
                choices = " or ".join(map(str, known)) or "a positive number"
                raise LowbitError(
                    "E0212",
                    f"{where} {key} must be {choices} in mode {mode}, found {printable(repr(told))}",
                )
            found.append(told)
        return Rule(found[0], found[1], str(mode))

    def _said_of(self, module: StoredModule) -> Rule | None:
        """The module's own words, or None."""
        own = (self.rules[name] for name in spellings(module.stored) if name in self.rules)
        return next(own, None)

    # ---- how it lies

    def _layout(self, module: StoredModule) -> Layout:
        """From dtypes and shapes, checked; a config that says otherwise is noted."""
        weight = entry_of(self.header, module, "weight", ("U32",), self.what)
        scales = entry_of(self.header, module, "scales", ("U8", *DENSE_DTYPES), self.what)
        out, columns = module.shape
        words = weight.shape[-1] if weight.shape else 0
        groups = scales.shape[-1] if scales.shape else 0
        bits = 32 * words // columns
        group = columns // groups if groups else 0
        if scales.dtype != "U8":
            rule = Rule(bits, group, "affine")
            known = bits in self.bits and (group in self.groups if self.groups else group > 0)
        else:
            modes = [mode for mode, found in FLOAT_MODES.items() if found[:2] == (bits, group)]
            rule, known = Rule(bits, group, (*modes, "")[0]), bool(modes)
        if not known or bits * columns != 32 * words or group * groups != columns:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} is {list(weight.shape)}, {scales.name!r} is "
                f"{scales.dtype} {list(scales.shape)}; for {out} x {columns} weights that is no mode of "
                f"{self.what} ({', '.join(map(str, self.bits))} bits in groups of "
                f"{' or '.join(map(str, self.groups)) or 'any size'}{self.others}). Config and weights are "
                "from different models",
            )
        lead = () if module.expert is None else (module.experts,)
        check_shape(weight, (*lead, out, words), f"{self.what} with {bits} bits")
        check_shape(scales, (*lead, out, groups), f"{self.what} with groups of {group}")
        outer = self._check_others(module, rule, scales)
        self._compare(module, rule, weight)
        return Layout(rule, DENSE_DTYPES.get(scales.dtype) or FLOAT_MODES[rule.mode][3], outer)

    def _check_others(self, module: StoredModule, rule: Rule, scales: TensorEntry) -> bool:
        """The biases are like the scales and only where they belong; whether there is a global scale."""
        biases, outer = module.tensor(self.offsets), module.tensor("global_scale")
        if rule.mode == "affine":
            what = f"{self.what} with {scales.dtype} scales"
            check_shape(
                entry_of(self.header, module, self.offsets, (scales.dtype,), what), scales.shape, what
            )
        wrong = biases if rule.mode != "affine" else outer
        if wrong in self.header.tensors and (rule.mode != "nvfp4" or wrong == biases):
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(wrong)}: tensor {wrong!r} lies beside weights of mode {rule.mode}, "
                "which has none; the packing does not match the quantization config",
            )
        if outer not in self.header.tensors:
            return False
        entry = entry_of(self.header, module, "global_scale", ("F32",), self.what)
        if math.prod(entry.shape) != (1 if module.expert is None else module.experts):
            check_shape(entry, (module.experts,), self.what)
        return True

    def _compare(self, module: StoredModule, rule: Rule, weight: TensorEntry) -> None:
        said = self._said_of(module)
        wanted = self.every if said is None else said
        if wanted == Rule() or (wanted.bits, wanted.group, wanted.mode) == (rule.bits, rule.group, rule.mode):
            return  # true says nothing
        says = "that it is not quantized" if wanted.plain else str(wanted)
        self.notes.contradiction(
            "E0214",
            f"{weight.file.name}: {module.stored!r} is stored as {rule}, {self.place} says {says}; reading "
            "it as it is stored",
        )

    def _numbers(self, module: StoredModule, suffix: str, data: TensorData) -> Tensor:
        """Scales or biases of the module, as stored."""
        name = module.tensor(suffix)
        stored = of_expert(module, data.tensor(name))
        if stored.dtype == torch.uint8:
            nvfp4 = FLOAT_MODES[self._layout(module).rule.mode][3] == "e4m3"
            stored = stored.view(torch.float8_e4m3fn if nvfp4 else torch.float8_e8m0fnu)
        return finite_scales(self.header, name, stored)


class Metal(Mlx):
    """transformers' ``metal``: affine, 2, 4 or 8 bits; groups of any size."""

    name = "metal"
    reference = "transformers"
    offsets = "qbiases"
    what = "metal"
    bits = (2, 4, 8)
    groups = ()
    others = ""


FORMATS = (Mlx, Metal)
