"""ModelOpt, written as version 0.47 exports it: see ``modelopt`` for the layouts.

    codes  scales                          inputs                             quant_algo
    e2m1   e4m3 for 16 under one float32   nvfp4; as they are                 NVFP4; W4A16_NVFP4
    e2m1   the same for 32                 e4m3                               W4A8_NVFP4_FP8
    e2m1   e8m0 for 32                     as they are; e4m3                  W4A16_MXFP4; W4A8_MXFP4_FP8
    e2m1   the same                        mxfp8                              W4A8_MXFP4_MXFP8
    e4m3   e8m0 for 32                     mxfp8                              MXFP8
    e4m3   one; a row; 128 x 128           e4m3; a token's; as they are       FP8; FP8_PER_CHANNEL…; FP8_PB_WO
    int4   groups of a row                 as they are                        W4A16_AWQ
    int8   a row                           int8; as they are                  W8A8_SQ_PER_CHANNEL; W8A16

Scales are float32 where they are floats, which is exact. Modules of several algorithms make MIXED_PRECISION
with each one's in ``quantized_layers``. W4A8_AWQ is refused: its second scale is no part of the numbers here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import InputRule, StoredModule
from lowbit.formats.writing import NOT_IN_TRANSFORMERS, CheckpointWriter, cannot
from lowbit.numerics.bit_packing import pack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

VERSION = "0.47.0"
_FLOATS = ("f32", "bf16", "f16")

Json = dict[str, object]


def _inputs(code: str, block: tuple[int, int], limit: float = 0.0, scale: str = "f32") -> ActivationScheme:
    return ActivationScheme(
        number_format(code),
        block,
        "static" if block == (0, 0) else "dynamic",
        limit=limit,
        scale=number_format(scale),
    )


_STATIC = _inputs("e4m3", (0, 0), 448.0)
_TOKEN = _inputs("e4m3", (1, 0), 448.0)
_MX = _inputs("e4m3", (1, 32), 448.0, "e8m0")
# (kind of weight, what its inputs may be) of each algorithm.
_ALGORITHMS: dict[str, tuple[str, tuple[ActivationScheme | None, ...]]] = {
    "NVFP4": ("nvfp4", (_inputs("e2m1", (1, 16), scale="e4m3"),)),
    "W4A16_NVFP4": ("nvfp4", (None,)),
    "W4A8_NVFP4_FP8": ("nvfp4", (_STATIC, _TOKEN)),
    "W4A16_MXFP4": ("mxfp4", (None,)),
    "W4A8_MXFP4_MXFP8": ("mxfp4", (_MX,)),
    "W4A8_MXFP4_FP8": ("mxfp4", (_STATIC, _TOKEN)),
    "MXFP8": ("mxfp8", (_MX,)),
    "FP8": ("fp8 tensor", (_STATIC, _TOKEN)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8 channel", (_TOKEN,)),
    "FP8_PB_WO": ("fp8 block", (None,)),  # or one scale, of a matrix that is less than a block
    "W4A16_AWQ": ("int4", (None,)),
    "W8A8_SQ_PER_CHANNEL": ("int8", (_inputs("int8", (0, 0), 127.0), _inputs("int8", (1, 0), 127.0))),
    "W8A16": ("int8", (None,)),
}


class ModelOptWriter(CheckpointWriter):
    """See the module docstring."""

    name = "modelopt"
    writes = "NVFP4, MXFP4, MXFP8, FP8 (tensor, channel, block), int4 AWQ, int8; mixed"
    misread = (
        f"modelopt is for SGLang, vLLM and NVIDIA's engines; {NOT_IN_TRANSFORMERS}, or stops where they are "
        "packed. For transformers: --format compressed-tensors, where that holds the same numbers, or dense"
    )
    config_files = ("hf_quant_config.json",)
    multiplies = True

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes and scales, sizes, inputs, in this order."""
        if scheme.is_dense:
            return None
        kind = _kind(scheme)
        if kind is None:
            return f"it has no layout for {scheme}"
        width = scheme.blocks[0][1]
        if kind not in ("fp8 tensor", "fp8 channel", "fp8 block", "int8") and shape[1] % (width or 1):
            return f"groups of {width} do not divide its {shape[1]} columns"
        if kind == "int4" and shape[0] % 2:
            return f"two rows of int4 share a byte, and it has {shape[0]}"
        if kind == "fp8 tensor" and scheme.activation is None and max(shape) > 128:
            return "one scale for weights alone is for matrices up to 128 x 128"
        if _algorithm(scheme) is None:
            return f"no algorithm of it has {kind} weights with inputs {scheme.activation or 'as they are'}"
        return None

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        kind, scale = _kind(weight.scheme), weight.scales[0]
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        elif kind != "nvfp4":
            scale = scale.float()
        if kind == "fp8 tensor":
            scale = scale.reshape(())
        elif kind in ("fp8 channel", "int8"):
            scale = scale.reshape(-1)
        elif kind == "fp8 block":
            scale = scale[:, None, :, None]
        found = {"weight": _codes(weight), "weight_scale": scale}
        if kind == "nvfp4":
            found["weight_scale_2"] = weight.scales[1].float().reshape(())
        activation = weight.scheme.activation
        if activation is not None and (activation.mode == "static" or activation.block == (1, 16)):
            if input is None or input.static_scale is None:
                raise cannot(self.name, module, "its static input scale is missing")
            found["input_scale"] = input.static_scale.float().reshape(())
        if input is not None and input.multiplier is not None:
            algorithm = _algorithm(weight.scheme)
            if algorithm not in ("NVFP4", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"):
                raise cannot(self.name, module, f"{algorithm} has no multiplied inputs")
            found["pre_quant_scale"] = input.multiplier
            self.learned[f"{algorithm} multiplied"] = 1.0
        return found

    def quantization_config(self) -> Json:
        """What config.json says: one algorithm, or each module's."""
        said = {name: self._said(scheme) for name, scheme in self.quantized().items()}
        kinds = {tuple(one.items()): one for one in said.values()}
        left = self.left_alone()
        found: Json = {"quant_method": "modelopt", "producer": _PRODUCER, "ignore": left}
        if len(kinds) == 1:
            return found | next(iter(kinds.values()))
        return found | {"quant_algo": "MIXED_PRECISION", "quantized_layers": said}

    def file_config(self, name: str) -> Json:
        """hf_quant_config.json: the same in an object of its own, and ``exclude_modules``."""
        told = self.quantization_config()
        inner: Json = {
            key: told[key] for key in ("quant_algo", "group_size", "quantized_layers") if key in told
        }
        if inner["quant_algo"] in ("W4A16_AWQ", "NVFP4_AWQ"):
            inner |= {"has_zero_point": False, "pre_quant_scale": True}
        inner |= {"kv_cache_quant_algo": None, "exclude_modules": told["ignore"]}
        return {"producer": _PRODUCER, "quantization": inner}

    def _said(self, scheme: Scheme) -> Json:
        """What the config says of a module."""
        name = _algorithm(scheme)
        if name == "NVFP4" and "NVFP4 multiplied" in self.learned:
            name = "NVFP4_AWQ"
        width = scheme.blocks[0][1] if len(scheme.blocks) == 2 or scheme.blocks[0][0] == 1 else 0
        return {"quant_algo": name} | ({"group_size": width} if width else {})


_PRODUCER: Json = {"name": "modelopt", "version": VERSION}


def _kind(scheme: Scheme) -> str | None:
    """The layout that holds such codes and scales."""
    if scheme.zero != "none" or scheme.offset or scheme.flattened or scheme.reordered:
        return None
    codes, blocks, scales = scheme.weight.name, scheme.blocks, tuple(one.name for one in scheme.scales)
    if len(blocks) == 2:
        nvfp4 = codes == "e2m1" and scales == ("e4m3", "f32") and blocks[1] == (0, 0)
        return "nvfp4" if nvfp4 and blocks[0] in ((1, 16), (1, 32)) else None
    if scales == ("e8m0",):
        return {"e2m1": "mxfp4", "e4m3": "mxfp8"}.get(codes) if blocks == ((1, 32),) else None
    if len(blocks) != 1 or scales[0] not in _FLOATS:
        return None
    if codes == "e4m3":
        return {(0, 0): "fp8 tensor", (1, 0): "fp8 channel", (128, 128): "fp8 block"}.get(blocks[0])
    if codes == "int4" and blocks[0][0] == 1:
        return "int4"
    return "int8" if codes == "int8" and blocks[0] == (1, 0) else None


def _algorithm(scheme: Scheme) -> str | None:
    """The name of ``_ALGORITHMS`` with such weights and inputs; MX scales of inputs round up in all."""
    kind = _kind(scheme)
    if kind == "fp8 tensor" and scheme.activation is None:
        return "FP8_PB_WO"
    for name, (wanted, inputs) in _ALGORITHMS.items():
        if kind == wanted and scheme.activation in inputs:
            return name
    return None


def _codes(weight: QuantizedTensor) -> Tensor:
    name, codes = weight.scheme.weight.name, weight.codes
    if name == "e2m1":
        return pack_bits(codes, 4)
    if name == "int4":
        nibbles = codes ^ 8  # offset binary to two's complement
        return nibbles[::2] | nibbles[1::2] << 4
    if name == "int8":
        return (codes ^ 0x80).view(torch.int8)
    return codes.view(torch.float8_e4m3fn)


WRITERS = (ModelOptWriter,)
