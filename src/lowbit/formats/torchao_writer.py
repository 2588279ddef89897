"""torchao, written as transformers 5 and torchao 0.15 to 0.18 read it. The layout is that of ``torchao``.

    scheme                                       class
    int8, f32 scales                             Int8Tensor; inputs plain or by torchao's int8 rule
    e4m3, f32 scales                             Float8Tensor; inputs plain or by torchao's float8 rule
    int4 with offsets, a row's groups            Int4Tensor
    2- to 8-bit integers, zero points or none    IntxUnpackedToInt8Tensor, a byte a code
    fp4, fp6, fp8 under e8m0 scales of groups    MXTensor; inputs plain or by its own rule
    e2m1 under e4m3 scales of 16, or these       NVFP4Tensor; inputs plain or its own, under one static scale
    under one f32 scale

Scales of the last two lie in rows, which the tool puts in tiles itself. It has no name for MX weights whose
inputs stay plain; the config then names the rule for both, and each weight's own attributes, which the tool
goes by, say that only it is quantized. transformers 5.23 loads no NVFP4Tensor with a static scale for inputs,
the tool's own neither; torchao does.

Modules of different kinds are asked for one by one, by torchao's FqnToConfig. A weight without a column of
inputs to quantize is plain; ``tensor_names`` lists the quantized ones, in every shard, as the tool wants it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.formats import InputRule, StoredModule
from lowbit.formats.torchao_described import ELEMENTS, FLOAT8, INT4, INT8, INTX, MX, NVFP4
from lowbit.formats.writing import CheckpointWriter, cannot
from lowbit.numerics.bit_packing import pack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme
from lowbit.numerics.torchao_inputs import (
    MX_MODES,
    PER_ROW,
    PER_TENSOR,
    float8_inputs,
    int8_inputs,
    int8_inputs_with_zeros,
    mx_inputs,
)

Json = dict[str, object]

_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_CODES = {code: (name, packed) for name, (code, _, packed) in ELEMENTS.items()}
_NVFP4_INPUTS = ActivationScheme(number_format("e2m1"), (1, 16), scale=number_format("e4m3"))
_INT8_INPUTS = (None, int8_inputs(PER_ROW), int8_inputs(PER_TENSOR), int8_inputs_with_zeros())


class TorchaoWriter(CheckpointWriter):
    """``dtype``: what the tool dequantizes to, that of most plain matrices."""

    name = "torchao"
    writes = (
        "int8, float8 (weights alone; inputs a row or tensor), int4 with offsets, 2-8 bit integers; MX (fp4, "
        "fp6, fp8) and NVFP4, inputs too"
    )
    described = 800

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(schemes)
        self.dtype = self.usual_float()

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks, scales and inputs, in this order."""
        if scheme.is_dense:
            return None
        outer = len(scheme.blocks) == 2 and _kind(scheme) == NVFP4
        if scheme.reordered or scheme.flattened or not (len(scheme.blocks) == 1 or outer):
            return f"it has one level of scales in blocks, columns in their order; this is {scheme}"
        rows, columns = scheme.blocks[0]
        if shape[0] % (rows or 1) or shape[1] % (columns or 1):
            return f"blocks divide the weight; {shape} and {scheme} do not"
        kind = _kind(scheme)
        if kind is None:
            return f"none of its tensors holds {scheme}"
        if kind == INT4 and (scheme.scales[0].name not in _TORCH or rows != 1 or not columns or shape[1] % 2):
            return f"int4 has groups of a row and an even number of columns, not {scheme}"
        if kind in (MX, NVFP4) and shape[1] % _CODES[scheme.weight.name][1]:
            return f"a byte has codes of two columns, not of one of {shape[1]}"
        if kind == INTX and scheme.scales[0].name not in _TORCH:
            return f"integers have plain scales, not {scheme}"
        return None

    def metadata(self) -> dict[str, str]:
        """The names of all tensor subclasses; each is described in the shard that holds it."""
        names = [f"{name}.weight" for name in self.quantized()]
        return {"format": "pt", "tensor_names": json.dumps(names)}

    def description(self, module: StoredModule) -> dict[str, str]:
        """The class and attributes of a quantized weight."""
        scheme = self.schemes[module.stored]
        if scheme.is_dense:
            return {}
        kind = _kind(scheme)
        assert kind is not None, "refuses_to_write() was asked first"
        if kind in (MX, NVFP4):
            return {module.tensor("weight"): self._of_small_floats(kind, scheme)}
        rows, columns = scheme.blocks[0]
        data: Json = {"block_size": [rows or module.shape[0], columns or module.shape[1]]}
        parts = ["qdata", "scale"] + ["zero_point"] * (kind != FLOAT8)
        if kind == INT4:
            data |= {"shape": list(module.shape), "activation_dtype": _torch_dtype("bfloat16")}
        else:
            data["dtype"] = _torch_dtype(self.dtype)
        if kind == INTX:
            bits = int(scheme.weight.bits)
            inputs = None if scheme.activation is None else "int8_asym_per_token"
            data |= {"target_dtype": _torch_dtype(f"int{bits}"), "activation_quantization": inputs}
        if kind == INT8:
            data |= {"act_quant_kwargs": _int8_kwargs(scheme.activation), "reduce_range": False}
        if kind == FLOAT8:
            mm_config = None if scheme.activation is None else _MM_CONFIG
            data |= {"mm_config": mm_config, "act_quant_kwargs": _float8_kwargs(scheme.activation)}
            data["kernel_preference"] = _AUTO
        text = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": parts})
        return {module.tensor("weight"): text}

    def _of_small_floats(self, kind: str, scheme: Scheme) -> str:
        """What MXTensor and NVFP4Tensor say of themselves."""
        data: Json = {"block_size": scheme.blocks[0][1], "orig_dtype": _torch_dtype(self.dtype)}
        data |= {"is_swizzled_scales": False, "act_quant_kwargs": _small_kwargs(kind, scheme.activation)}
        parts = ["qdata", "scale"]
        if kind == MX:
            data |= {"elem_dtype": _element(scheme.weight.name), "kernel_preference": _AUTO}
        else:
            data["use_triton_kernel"] = False
            parts += ["per_tensor_scale"] * (len(scheme.scales) == 2)
            parts += ["act_per_tensor_scale"] * (scheme.activation is not None)
        return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": parts})

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        kind, codes, scale = _kind(weight.scheme), weight.codes, weight.scales[0]
        if kind in (MX, NVFP4):
            name = weight.scheme.weight.name
            dtype = number_format(name).dtype
            codes = pack_bits(codes, 4) if _CODES[name][1] == 2 else codes
            found = {"_weight_qdata": codes if dtype is None else codes.view(dtype), "_weight_scale": scale}
            if len(weight.scales) == 2:
                found["_weight_per_tensor_scale"] = weight.scales[1].float().reshape(())
            if kind == NVFP4 and weight.scheme.activation is not None:
                if input is None or input.static_scale is None:
                    raise cannot(self.name, module, "its inputs have no scale of the whole tensor")
                found["_weight_act_per_tensor_scale"] = input.static_scale.float().reshape(())
            return found
        if kind == INT4:
            nibbles = codes ^ 8  # offset binary to two's complement
            packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(torch.int8)
            return {
                "_weight_qdata": packed,
                "_weight_scale": scale.T,
                "_weight_zero_point": weight.offsets[0].T,
            }
        if kind == FLOAT8:
            return {"_weight_qdata": codes.view(torch.float8_e4m3fn), "_weight_scale": scale}
        zeros = torch.zeros(scale.shape, dtype=torch.int8)
        middle = 1 << int(weight.scheme.weight.bits) - 1
        if weight.zeros is not None:
            zeros = (weight.zeros.to(torch.int16) - middle).to(torch.int8)
        signed = (codes.to(torch.int16) - middle).to(torch.int8)
        return {"_weight_qdata": signed, "_weight_scale": scale, "_weight_zero_point": zeros}

    def quantization_config(self) -> Json:
        """transformers' TorchAoConfig."""
        configs = {name: _config(scheme) for name, scheme in self.quantized().items()}
        kinds = {json.dumps(config): config for config in configs.values()}
        only = next(iter(kinds.values())) if len(kinds) == 1 else None
        by_name: Json = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": configs}}
        return {
            "quant_method": "torchao",
            "quant_type": {"default": only or by_name},
            "modules_to_not_convert": self.left_alone(),
            "include_input_output_embeddings": any(name.endswith("embed_tokens") for name in configs),
            "untie_embedding_weights": False,
        }


_AUTO: Json = {"_type": "KernelPreference", "_data": "AUTO"}
_MM_CONFIG: Json = {
    "_type": "Float8MMConfig",
    "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
}


def _kind(scheme: Scheme) -> str | None:
    """The class that holds such a weight with such inputs, or None."""
    codes, inputs, zero = scheme.weight, scheme.activation, scheme.zero
    small = _small_kind(scheme)
    if small is not None:
        return small
    single = scheme.scales[0].name == "f32"
    if scheme.offset:
        return INT4 if codes.name == "int4" and zero == "none" and inputs is None else None
    if codes.name == "int8" and zero == "none" and single:
        return INT8 if inputs in _INT8_INPUTS else None
    if codes.name == "e4m3" and zero == "none" and single:
        return FLOAT8 if inputs is None or _is_float8(inputs) else None
    if not codes.is_integer or codes.bits < 2 or inputs not in (None, int8_inputs_with_zeros()):
        return None
    signed = codes.name.startswith("int")
    return INTX if (signed and zero == "none") or (not signed and zero == "integer") else None


def _small_kind(scheme: Scheme) -> str | None:
    """MXTensor or NVFP4Tensor, or None."""
    rows, columns = scheme.blocks[0]
    plain = scheme.zero == "none" and not scheme.offset and rows == 1 and columns
    if not plain or scheme.weight.name not in _CODES:
        return None
    scales = [scale.name for scale in scheme.scales]
    if scales == ["e8m0"]:
        return MX if scheme.activation is None or _mode(scheme.activation) else None
    outer = scales == ["e4m3"] or (scales == ["e4m3", "f32"] and scheme.blocks[1] == (0, 0))
    if scheme.weight.name != "e2m1" or columns != 16 or not outer:
        return None
    return NVFP4 if scheme.activation in (None, _NVFP4_INPUTS) else None


def _mode(inputs: ActivationScheme) -> str | None:
    """How MXTensor calls the way its scales are found; None where it has none."""
    fmt, block = inputs.number_format, inputs.block[1]
    if fmt.name not in _CODES or not block:
        return None
    return next((mode for mode in MX_MODES if mx_inputs(fmt, block, mode) == inputs), None)


def _element(code: str) -> Json | str:
    """torchao's word for it: a dtype where PyTorch has one."""
    name = _CODES[code][0]
    return name if name.startswith("fp6") else _torch_dtype(name)


def _small_kwargs(kind: str, inputs: ActivationScheme | None) -> Json | None:
    if inputs is None:
        return None
    if kind == NVFP4:
        data: Json = {"block_size": 16, "is_swizzled_scales": False, "use_triton_kernel": False}
        data["use_dynamic_per_tensor_scale"] = False
        return {"_type": "QuantizeTensorToNVFP4Kwargs", "_data": data}
    data = {"elem_dtype": _element(inputs.number_format.name), "block_size": inputs.block[1]}
    data["scaling_mode"] = {"_type": "ScaleCalculationMode", "_data": str(_mode(inputs)).upper()}
    data |= {"kernel_preference": _AUTO, "is_swizzled_scales": False}
    return {"_type": "QuantizeTensorToMXKwargs", "_data": data}


def _is_float8(inputs: ActivationScheme) -> bool:
    block = inputs.block
    return block in (PER_ROW, PER_TENSOR) and inputs == float8_inputs(block, inputs.upper_bound)


def _torch_dtype(name: str) -> Json:
    return {"_type": "torch.dtype", "_data": name}


def _granularity(block: tuple[int, int]) -> Json:
    return (
        {"_type": "PerTensor", "_data": {}}
        if block == PER_TENSOR
        else {"_type": "PerRow", "_data": {"dim": -1}}
    )


def _int8_kwargs(inputs: ActivationScheme | None) -> Json | None:
    if inputs is None:
        return None
    data: Json = {
        "granularity": _granularity(inputs.block),
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if inputs.symmetric else "ASYMMETRIC"},
        "reduce_range": False,
    }
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": data}


def _float8_kwargs(inputs: ActivationScheme | None) -> Json | None:
    if inputs is None:
        return None
    data: Json = {
        "float8_dtype": _torch_dtype("float8_e4m3fn"),
        "granularity": _granularity(inputs.block),
        "mm_config": None,
        "hp_value_lb": None,
        "hp_value_ub": inputs.upper_bound or None,
        "kernel_preference": _AUTO,
    }
    return {"_type": "QuantizeTensorToFloat8Kwargs", "_data": data}


def _config(scheme: Scheme) -> Json:
    """torchao's config that would make such a weight; what a tool asks to know the kind of the checkpoint."""
    kind, (rows, columns), inputs = _kind(scheme), scheme.blocks[0], scheme.activation
    own = {"_type": "PerTensor", "_version": 1, "_data": {}}
    if columns:
        own = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": columns}}
    elif rows:
        own = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if kind == NVFP4 and inputs is None:
        data: Json = {"use_dynamic_per_tensor_scale": len(scheme.scales) == 2}
        return {"_type": "NVFP4WeightOnlyConfig", "_version": 1, "_data": data}
    if kind == NVFP4:
        data = {"use_triton_kernel": False, "use_dynamic_per_tensor_scale": False, "step": "convert"}
        return {"_type": "NVFP4DynamicActivationNVFP4WeightConfig", "_version": 1, "_data": data}
    if kind == MX:
        element = _element(scheme.weight.name)
        mode = (None if inputs is None else _mode(inputs)) or "rceil"
        data = {"block_size": columns, "activation_dtype": element, "weight_dtype": element}
        data["kernel_preference"] = _AUTO
        data["scaling_mode"] = {"_type": "ScaleCalculationMode", "_data": mode.upper()}
        return {"_type": "MXDynamicActivationMXWeightConfig", "_version": 1, "_data": data}
    if kind == INT4:
        return {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": columns}}
    if kind == INTX:
        name = f"int{int(scheme.weight.bits)}"
        mapping = {"_type": "MappingType", "_data": "SYMMETRIC" if scheme.zero == "none" else "ASYMMETRIC"}
        axis = own if columns else {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
        dtype, of = _torch_dtype(name), "" if inputs is None else "weight_"
        data = {"weight_dtype": dtype, f"{of}granularity": axis, f"{of}mapping_type": mapping}
        only = "IntxWeightOnlyConfig" if inputs is None else "Int8DynamicActivationIntxWeightConfig"
        return {"_type": only, "_version": 2, "_data": data}
    if inputs is None:
        if kind == INT8:
            return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": own}}
        return {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}
    both = {**_granularity(inputs.block), "_version": 1}
    name = (
        "Int8DynamicActivationInt8WeightConfig"
        if kind == INT8
        else "Float8DynamicActivationFloat8WeightConfig"
    )
    data = {"granularity": both}
    if not inputs.symmetric:
        data["act_mapping_type"] = {"_type": "MappingType", "_data": "ASYMMETRIC"}
    return {"_type": name, "_version": 2, "_data": data}


WRITERS = (TorchaoWriter,)
