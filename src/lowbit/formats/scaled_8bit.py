"""FP8 and int8 weights beside their scales, and a config that says nothing: what some exporters leave.

    weight         F8_E4M3, F8_E5M2 or I8 [out, in]
    weight_scale or weight_scale_inv    one number; one a row, [out] or [out, 1]; or blocks of 128 x 128
    input_scale    one number beside FP8 weights: inputs are then rounded to e4m3 under it
    comfy_quant    U8: JSON, with which ComfyUI's files say a weight's format once more

weight[r, c] = code[r, c] * scale[block of (r, c)], both names multiply; I8 is two's complement. Without a
config nobody says that inputs are quantized, so they are not, but where their scale is there: that loses the
least. Other block sizes cannot be told from a scale's shape and are refused, and so is a checkpoint that has
parts of another method's weights too. A scale of any other meaning has another name in every known method.
ComfyUI's text must agree with what is there; more than that (weights turned by ``convrot``) is refused.
"""

from __future__ import annotations

import json
import math
from typing import ClassVar

import torch

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import InputRule, Notes, StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import SCALED_8BIT, is_dense, of_expert, origin_of, scaled_8bit
from lowbit.formats.partly_dense import PartlyDense
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_CODES = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "I8": "int8"}
_SCALES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_NAMES = ("weight_scale", "weight_scale_inv")
_SQUARE = 128
_COMFY = "comfy_quant"
# ComfyUI's format -> dtype, and the blocks a scale may have there.
_COMFY_FORMATS = {
    "float8_e4m3fn": ("F8_E4M3", ((0, 0),)),
    "float8_e4m3fn_rowwise": ("F8_E4M3", ((1, 0),)),
    "float8_e4m3fn_blockwise": ("F8_E4M3", ((_SQUARE, _SQUARE),)),
    "int8_tensorwise": ("I8", ((0, 0), (1, 0))),
    "int8_blockwise": ("I8", ((_SQUARE, _SQUARE),)),
}
# What it may say beside the format: how ComfyUI computes, or the same once more.
_COMFY_WORDS = ("format", "orig_dtype", "group_size", "per_row", "full_precision_matrix_mult")
_WHAT = "an 8-bit weight without a quantization config"


class Scaled8Bit(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "scaled-8bit"
    reference: ClassVar[str] = "lowbit"

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """An 8-bit weight with its scale, and no config that names a method."""
        return scaled_8bit(header)

    def describe(self) -> str:
        """What the tensors show."""
        kinds = {entry.dtype for entry in self.header.tensors.values()} & set(SCALED_8BIT)
        names = " and ".join(sorted({_CODES[kind] for kind in kinds}))
        return f"{names} weights with scales, recognised from the tensors (config.json says nothing)"

    def _is_dense(self, module: StoredModule) -> bool:
        return is_dense(self.header, module)

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the shape of the scale."""
        weight, scale = self._entries(module)
        activation = None
        if self._input_scale(module, weight) is not None:
            activation = ActivationScheme(number_format("e4m3"), (0, 0), "static")
        block = self._block(module, scale)
        return Scheme(
            number_format(_CODES[weight.dtype]),
            (block,),
            (number_format(_SCALES[scale.dtype]),),
            activation=activation,
        )

    def _tensors(self, module: StoredModule) -> list[str]:
        """Weight and scales."""
        _, scale = self._entries(module)
        inputs = module.tensor("input_scale")
        more = [name for name in (inputs, module.tensor(_COMFY)) if name in self.header.tensors]
        return [module.tensor("weight"), scale.name, *more]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The bytes as codes, the scales as they are."""
        weight, scale = self._entries(module)
        scheme = self.scheme_of(module)
        self._check_comfy(module, weight, scheme.blocks[0], data)
        codes = of_expert(module, data.tensor(weight.name)).view(torch.uint8)
        if weight.dtype == "I8":
            codes = codes ^ 0x80  # two's complement to offset binary
        scales = finite_scales(self.header, scale.name, of_expert(module, data.tensor(scale.name)))
        grid = [-(-n // (size or n)) for n, size in zip(module.shape, scheme.blocks[0], strict=True)]
        return QuantizedTensor(
            scheme, module.shape, codes, (scales.reshape(grid),), origin=origin_of(self.header, module)
        )

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """Its static scale where one is stored."""
        weight, _ = self._entries(module)
        inputs = self._input_scale(module, weight)
        if inputs is None:
            return None
        told = finite_scales(self.header, inputs.name, of_expert(module, data.tensor(inputs.name)))
        return InputRule(static_scale=told.float().reshape(()))

    def _entries(self, module: StoredModule) -> tuple[TensorEntry, TensorEntry]:
        """The weight and its scale, dtypes and shapes checked."""
        lead = () if module.expert is None else (module.experts,)
        weight = entry_of(self.header, module, "weight", SCALED_8BIT, _WHAT)
        check_shape(weight, (*lead, *module.shape), _WHAT)
        here = [suffix for suffix in _NAMES if module.tensor(suffix) in self.header.tensors]
        scale = entry_of(self.header, module, (here or list(_NAMES))[0], tuple(_SCALES), _WHAT)
        if lead and scale.shape[:1] != lead:
            check_shape(scale, (*lead, module.shape[0], 1), _WHAT)
        return weight, scale

    def _block(self, module: StoredModule, scale: TensorEntry) -> tuple[int, int]:
        out, columns = module.shape
        shape = scale.shape if module.expert is None else scale.shape[1:]
        if shape in ((out,), (out, 1)):
            return (1, 0)
        if math.prod(shape) == 1 and (len(shape) < 2 or max(out, columns) > _SQUARE):
            return (0, 0)
        if shape == (-(-out // _SQUARE), -(-columns // _SQUARE)):
            return (_SQUARE, _SQUARE)
        raise LowbitError(
            "E0213",
            f"{scale.file.name}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)} beside a weight "
            f"of {out} x {columns}; without a quantization config only one number, one a row or blocks of "
            f"{_SQUARE} x {_SQUARE} can be told. Restore the quantization_config of these weights",
        )

    def _check_comfy(
        self, module: StoredModule, weight: TensorEntry, block: tuple[int, int], data: TensorData
    ) -> None:
        """E0218 where ComfyUI's text, if there is one, says anything else than the tensors."""
        name = module.tensor(_COMFY)
        if name not in self.header.tensors:
            return
        text = bytes(data.tensor(name).view(torch.uint8).flatten().tolist()).decode(errors="replace")
        try:
            told = json.loads(text)
        except ValueError:
            told = None
        told = told if isinstance(told, dict) else {}
        dtype, may_be = _COMFY_FORMATS.get(str(told.get("format")), ("", ()))
        more = [word for word, value in told.items() if value and word not in _COMFY_WORDS]
        if dtype != weight.dtype or block not in may_be or more:
            raise LowbitError(
                "E0218",
                f"{self.header.file_of(name)}: tensor {name!r} says {printable(text[:200])} of a weight that "
                f"is {weight.dtype} with a scale for {block[0] or 'all'} x {block[1] or 'all'}; read are "
                f"{', '.join(_COMFY_FORMATS)} without more. Convert the model another way",
            )

    def _input_scale(self, module: StoredModule, weight: TensorEntry) -> TensorEntry | None:
        entry = self.header.tensors.get(module.tensor("input_scale"))
        if entry is None:
            return None
        lead = 1 if module.expert is None else module.experts
        if weight.dtype == "I8" or entry.dtype not in _SCALES or math.prod(entry.shape) != lead:
            raise LowbitError(
                "E0218",
                f"{entry.file.name}: tensor {entry.name!r} ({entry.dtype} {list(entry.shape)}) beside an "
                f"{weight.dtype} weight: without a quantization config only one number beside FP8 can be "
                "understood. Restore the quantization_config that belongs to these weights",
            )
        return entry


FORMAT = Scaled8Bit
