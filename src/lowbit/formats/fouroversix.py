"""Four Over Six (Cook et al., 2025): NVFP4 whose blocks reach to 4 or 6, what loses less; MXFP4, NVINT4.

    quantized_weight_values         U8 [out, in / 2], low nibble: the even column
    quantized_weight_scale_factors  F8_E4M3 [out * in / 16]; mxfp4: F8_E8M0 [out * in / 32]
    quantized_weight_amax           F32 [1]
    quantized_weight_metadata       I64 [6]: out, in, both as padded, 1 (packed), whether scales are tiled

weight = code * scale * amax / (largest code * largest scale). These two follow from ``weight_scale_rule`` or
``scale_rule``: 6 and 256 where blocks choose (mse, mae, abs_max), 6 and 448 for static_6, 4 and 448 for
static_4; nvint4's codes are two's complement, up to 7. mxfp4 is code * scale. Rows are padded to 128, columns
to four scales. Tiled scales lie as ``tiled_scales`` says. ``module_config_overrides`` speaks for a module
alone, and inherits nothing.

The tool quantizes inputs too, under one scale for all tokens, block by block by the same choice. That is not
done: inputs stay as they are, which is nearer to the model that was quantized, and a warning says so.
Refused by name: if4 (a scale's sign chooses the kind of code), nvfp6, kept master weights, stacked experts.
Sources: fouroversix 1.0.5, transformers' FourOverSixConfig.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales, require_tensors
from lowbit.formats.dense import origin_of
from lowbit.formats.partly_dense import PartlyDense, refuse_stack
from lowbit.formats.quantization_config import claimed_config
from lowbit.formats.tiled_scales import in_rows
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_log = logging.getLogger("lowbit")

# dtype -> (the code, columns under a scale, the scale, its dtype in files)
_KINDS = {
    "nvfp4": ("e2m1", 16, "e4m3", "F8_E4M3"),
    "nvint4": ("int4", 16, "e4m3", "F8_E4M3"),
    "mxfp4": ("e2m1", 32, "e8m0", "F8_E8M0"),
}
# rule -> largest code times largest scale
_LARGEST = dict.fromkeys(("mse", "mae", "abs_max"), 6.0 * 256)
_LARGEST |= {"static_6": 6.0 * 448, "static_4": 4.0 * 448}
_TILE = 128  # rows; and of columns four scales
_WHAT = "Four Over Six"
_OWN = tuple(f"quantized_weight_{name}" for name in ("values", "scale_factors", "amax", "metadata"))


class FourOverSix(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "fouroversix"
    reference: ClassVar[str] = "fouroversix"
    sign: ClassVar[str] = "quantized_weight_values"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = claimed_config(header)
        self.place = found.place
        self.every = self._rule(found.values, self.place)
        overrides = found.values.get("module_config_overrides") or {}
        if not isinstance(overrides, dict) or not all(isinstance(one, dict) for one in overrides.values()):
            raise LowbitError("E0212", f"{self.place}.module_config_overrides must be an object of objects")
        self.own = {
            name: self._rule(values, f"{self.place}.module_config_overrides: {printable(repr(name))}")
            for name, values in overrides.items()
        }
        require_tensors(header, (f".{self.sign}",), self.place, self.name)
        _log.warning(
            "lowbit: %s quantizes inputs too, under one scale for all tokens of a step; they are left as "
            "they are, which is nearer to the original model",
            self.place,
        )

    def describe(self) -> str:
        """The numbers and the rule."""
        return f"fouroversix, {self.every[0]} by {self.every[1]} in {self.place.split(':')[0]}"

    def _rule(self, values: dict[str, object], place: str) -> tuple[str, str]:
        """(dtype, rule) of weights; E0212 or E0218 where they cannot be read."""
        if values.get("keep_master_weights"):
            raise LowbitError(
                "E0218",
                f"{place} keeps master weights, which are quantized when the tool computes; save it without "
                "keep_master_weights, or remove quantization_config to serve the weights as they are",
            )
        kind = values.get("weight_dtype") or values.get("dtype") or "nvfp4"
        rule = values.get("weight_scale_rule") or values.get("scale_rule") or "mse"
        if kind not in _KINDS:
            raise LowbitError(
                "E0218",
                f"{place}: weights in {printable(repr(kind))} are not read, {', '.join(_KINDS)} are; use a "
                "checkpoint in one of these",
            )
        if rule not in _LARGEST:
            raise LowbitError(
                "E0212",
                f"{place}: scale_rule {printable(repr(rule))} is unknown; known: {', '.join(_LARGEST)}",
            )
        return str(kind), str(rule)

    def _of(self, module: StoredModule) -> tuple[str, str]:
        return self.own.get(module.stored, self.every)

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the config; dtypes and shapes must agree."""
        self._grid(module)
        code, width, scale, _ = _KINDS[self._of(module)[0]]
        if scale == "e8m0":
            return Scheme(number_format(code), ((1, width),), (number_format(scale),))
        return Scheme(number_format(code), ((1, width), (0, 0)), (number_format(scale), number_format("f32")))

    def _tensors(self, module: StoredModule) -> list[str]:
        return [name for one in _OWN if (name := module.tensor(one)) in self.header.tensors]

    def _grid(self, module: StoredModule) -> tuple[int, int]:
        """(rows, columns) as they are padded in the file, after every tensor was checked."""
        refuse_stack(module, "Four Over Six")
        _, width, _, dtype = _KINDS[self._of(module)[0]]
        values = entry_of(self.header, module, self.sign, ("U8",), _WHAT)
        out, columns = module.shape
        padded = (-(-out // _TILE) * _TILE, -(-columns // (4 * width)) * 4 * width)
        if columns % width or values.shape != (out, columns // 2):
            check_shape(values, (padded[0], padded[1] // 2), _WHAT)
            out, columns = padded
        scales = entry_of(self.header, module, "quantized_weight_scale_factors", (dtype,), _WHAT)
        check_shape(scales, (out * columns // width,), _WHAT)
        if dtype == "F8_E4M3":
            amax = entry_of(self.header, module, "quantized_weight_amax", ("F32", "BF16", "F16"), _WHAT)
            if amax.shape:
                check_shape(amax, (1,), _WHAT)
        told = entry_of(self.header, module, "quantized_weight_metadata", ("I64", "I32"), _WHAT)
        check_shape(told, (6,), _WHAT)
        return out, columns

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked, scales in rows, padding cut off."""
        kind, rule = self._of(module)
        code, width, _, _ = _KINDS[kind]
        rows, columns = self._grid(module)
        tiled = self._tiled(module, data, (rows, columns))
        stored = data.tensor(module.tensor(self.sign))[: module.shape[0]]
        codes = unpack_bits(stored.contiguous(), 4, columns)[:, : module.shape[1]].contiguous()
        name = module.tensor("quantized_weight_scale_factors")
        scales = data.tensor(name)
        flat = scales.view(torch.uint8)
        grid = in_rows(flat, rows, columns // width) if tiled else flat.view(rows, columns // width)
        inner = grid[: module.shape[0], : module.shape[1] // width].contiguous().view(scales.dtype)
        found = [finite_scales(self.header, name, inner)]
        if kind != "mxfp4":
            name = module.tensor("quantized_weight_amax")
            amax = finite_scales(self.header, name, data.tensor(name)).float().reshape(1, 1)
            largest = 7.0 * 448 if kind == "nvint4" else _LARGEST[rule]
            found.append(amax / largest)
        return QuantizedTensor(
            self._scheme(module),
            module.shape,
            codes ^ 8 if code == "int4" else codes,
            tuple(found),
            origin=origin_of(self.header, module, self.sign),
        )

    def _tiled(self, module: StoredModule, data: TensorData, padded: tuple[int, int]) -> bool:
        """Whether scales lie in tiles; E0213 where the metadata contradict the tensors."""
        name = module.tensor("quantized_weight_metadata")
        told = [int(number) for number in data.tensor(name)]
        tiled = told[5] == 1
        whole = padded[0] % _TILE == 0 and padded[1] % (4 * _KINDS[self._of(module)[0]][1]) == 0
        if told[:5] != [*module.shape, *padded, 1] or told[5] not in (0, 1) or (tiled and not whole):
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} is {told}, expected "
                f"{[*module.shape, *padded, 1]} and 0 or, of whole tiles, 1; it describes other tensors",
            )
        return tiled


FORMAT = FourOverSix
