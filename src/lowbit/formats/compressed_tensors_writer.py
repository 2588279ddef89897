"""compressed-tensors, written as version 0.20 reads it: see ``compressed_tensors`` for the layouts.

    codes           inputs         format
    int2 … int8     as they are    pack-quantized (a dense bit stream, I32)
    int2 … int7     quantized      pack-quantized
    int8            quantized      int-quantized
    e4m3            either         float-quantized; mxfp8-quantized under e8m0 scales
    e2m1, e2m3      either         nvfp4-, mxfp4-, mxfp6-pack-quantized

Modules quantized alike make a config group. One group targets ``Linear`` and the ignore list names what was
left alone; several, or a quantized embedding, list their modules by name. NVFP4's outer scale is stored as
its reciprocal, in float32: an outer scale that is no float32's reciprocal is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.formats import InputRule, StoredModule
from lowbit.formats.writing import (
    EMBEDDINGS,
    CheckpointWriter,
    cannot,
    grouped_rows,
    largest_code,
    with_limit,
)
from lowbit.numerics.bit_packing import pack_bits, pack_words
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

VERSION = "0.20.0"
_FLOATS = ("f32", "bf16", "f16")
_MX_ROUND_UP = {"e2m1": 1.75, "e4m3": 1.75, "e2m3": 1.9375}
_MX_FORMATS = {
    "e2m1": "mxfp4-pack-quantized",
    "e2m3": "mxfp6-pack-quantized",
    "e4m3": "mxfp8-quantized",
}
_FLOAT_BITS = {"e2m1": 4, "e2m3": 6, "e4m3": 8}
_NVFP4 = ((1, 16), (0, 0))

Json = dict[str, object]


class CompressedTensorsWriter(CheckpointWriter):
    """See the module docstring."""

    name = "compressed-tensors"
    embeddings = True
    writes = (
        "pack-quantized 2-8 bit, int-quantized, float-quantized (tensor, channel, block), nvfp4, mxfp4, "
        "mxfp6, mxfp8; several groups"
    )

    @classmethod
    def refuses_to_write(cls, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Codes, blocks and inputs, in this order."""
        if scheme.is_dense:
            return None
        return _refuses_weight(scheme, shape) or _refuses_input(scheme)

    @classmethod
    def nearest(
        cls, weight: QuantizedTensor, input: InputRule | None
    ) -> tuple[QuantizedTensor, InputRule | None] | None:
        """With outer scales that are a float32's reciprocal: a unit or two in the last place away."""
        if len(weight.scales) != 2:
            return None

        def rounded(scale: Tensor) -> Tensor:
            return 1.0 / (1.0 / scale.float())

        if input is not None and input.static_scale is not None:
            input = replace(input, static_scale=rounded(input.static_scale))
        return replace(weight, scales=(weight.scales[0], rounded(weight.scales[1]))), input

    @classmethod
    def nearest_inputs(cls, scheme: Scheme) -> Scheme | None:
        """int8 whose largest |x| becomes half the range of codes, 127.5, where others have 127."""
        return with_limit(scheme, 127.5)

    def _pack(
        self, module: StoredModule, weight: QuantizedTensor, input: InputRule | None
    ) -> dict[str, Tensor]:
        scheme, layout = weight.scheme, format_of(weight.scheme)
        found = _codes(weight, layout)
        inner = weight.scales[0]
        if inner.dtype == torch.float8_e8m0fnu:
            inner = inner.view(torch.uint8)
        found["weight_scale"] = inner.reshape(1) if scheme.blocks[0][0] == 0 else inner
        if len(weight.scales) == 2:
            found["weight_global_scale"] = reciprocal(weight.scales[1], self.name, module)
        if weight.zeros is not None:
            found["weight_zero_point"] = _zeros(weight, layout)
        if weight.column_order is not None:
            group = scheme.blocks[0][1] or module.shape[1]
            index = torch.empty(module.shape[1], dtype=torch.int32)
            index[weight.column_order] = torch.arange(module.shape[1], dtype=torch.int32) // group
            found["weight_g_idx"] = index
        return found | self._input(module, scheme.activation, input)

    def _input(
        self, module: StoredModule, activation: ActivationScheme | None, rule: InputRule | None
    ) -> dict[str, Tensor]:
        if activation is None:
            return {}
        stored = None if rule is None else rule.static_scale
        if activation.mode != "static" and activation.scale.name != "e4m3":
            return {}
        if rule is None or stored is None:
            raise cannot(self.name, module, "its static input scale is missing")
        if activation.scale.name == "e4m3":
            return {"input_global_scale": reciprocal(stored, self.name, module)}
        found = {"input_scale": stored.float().reshape(1)}
        if not activation.symmetric:
            assert rule.static_zero is not None, "an asymmetric static scheme comes with its zero point"
            found["input_zero_point"] = rule.static_zero.reshape(1).to(torch.int8)
        return found

    def quantization_config(self) -> dict[str, object]:
        """Groups of modules that are quantized alike."""
        groups: dict[tuple[Scheme, str], list[str]] = {}
        for name, scheme in self.quantized().items():
            groups.setdefault((_told(scheme), format_of(scheme)), []).append(name)
        embeds = any(name.rpartition(".")[2] in EMBEDDINGS for name in self.quantized())
        by_class = len(groups) == 1 and not embeds
        formats = {layout for _, layout in groups}
        return {
            "quant_method": "compressed-tensors",
            "config_groups": {
                f"group_{number}": {
                    "targets": ["Linear"] if by_class else names,
                    "weights": _weight_args(scheme),
                    "input_activations": _input_args(scheme.activation),
                    "output_activations": None,
                    "format": layout,
                }
                for number, ((scheme, layout), names) in enumerate(groups.items())
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": self.left_alone(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": VERSION,
        }


def format_of(scheme: Scheme) -> str:
    """The tool's name of the layout a scheme is stored in."""
    if scheme.weight.is_integer:
        return "int-quantized" if scheme.weight.bits == 8 and scheme.activation else "pack-quantized"
    if len(scheme.blocks) == 2:
        return "nvfp4-pack-quantized"
    return _MX_FORMATS[scheme.weight.name] if scheme.scales[0].name == "e8m0" else "float-quantized"


def _told(scheme: Scheme) -> Scheme:
    """What the config can tell apart: not the dtype of scales; int4 with its zero points is uint4."""
    scales = tuple(number_format("f32") if s.name in _FLOATS else s for s in scheme.scales)
    return replace(scheme, scales=scales)


def _refuses_weight(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    name, columns = scheme.weight.name, shape[1]
    scales = tuple(scale.name for scale in scheme.scales)
    if scheme.offset or scheme.flattened or scheme.zero == "float":
        return f"it has no layout for {scheme}"
    if scheme.weight.is_integer:
        signed = name.startswith("int")
        if not 2 <= scheme.weight.bits <= 8 or signed != (scheme.zero == "none"):
            return f"integers are 2 to 8 bits, signed or with zero points, not {name}"
        if len(scales) != 1 or scales[0] not in _FLOATS:
            return f"scales of integers are {', '.join(_FLOATS)}, not {', '.join(scales)}"
        if scheme.blocks != ((0, 0),) and (reason := grouped_rows(scheme, columns)):
            return reason
        if scheme.blocks[0][1] and columns % scheme.blocks[0][1]:
            return f"groups of {scheme.blocks[0][1]} do not divide its {columns} columns"
        return None
    if name not in _FLOAT_BITS or scheme.reordered:
        return f"it has no layout for {scheme}"
    if columns * _FLOAT_BITS[name] % 8 and name != "e4m3":
        return f"its {columns} columns do not fill whole bytes"
    if name == "e2m1" and scheme.blocks == _NVFP4:
        return None if scales == ("e4m3", "f32") else f"NVFP4's scales are e4m3 and f32, not {scales}"
    if len(scales) != 1:
        return f"two levels of scales are NVFP4's; this is {scheme}"
    if scales[0] == "e8m0":
        exact = scheme.blocks == ((1, 32),) and columns % 32 == 0
        return None if exact else f"scales that are powers of two are one for 32 columns; this is {scheme}"
    if name != "e4m3" or scales[0] not in _FLOATS:
        return f"it has no layout for {scheme}"
    rows, width = scheme.blocks[0]
    if (rows == 0) != (width == 0) and rows != 1:
        return f"blocks are rows, tensors or rectangles; this is {scheme}"
    return None


def _refuses_input(scheme: Scheme) -> str | None:
    activation = scheme.activation
    if activation is None:
        return None
    try:
        args = _input_args(activation)
    except KeyError:
        args = None
    expected = None if args is None else _activation(args, activation)
    if expected != activation:
        return f"inputs cannot be said to be {activation}, the largest |x| {largest_code(activation):g}"
    if activation.scale.name == "e4m3" and scheme.blocks != _NVFP4:
        return "inputs under NVFP4's scales need NVFP4 weights"
    return None


def _activation(args: Json, like: ActivationScheme) -> ActivationScheme:
    """What the reader makes of these arguments."""
    code = like.number_format
    limit = (2**code.bits - 1) / 2 if code.is_integer and args["dynamic"] is True else 0.0
    made = ActivationScheme(
        code,
        like.block,
        mode="dynamic" if args["dynamic"] else "static",
        symmetric=bool(args["symmetric"]),
        limit=limit,
    )
    if args["strategy"] == "tensor_group":
        return replace(made, scale=number_format("e4m3"))
    if args.get("scale_dtype"):
        return replace(made, scale=number_format("e8m0"), round_up=_MX_ROUND_UP[code.name])
    if args["strategy"] == "group" and code.bits == 4 and not code.is_integer:
        return replace(made, scale=number_format("e8m0"), round_up=_MX_ROUND_UP[code.name])
    return made


def _number(fmt_name: str, bits: float) -> Json:
    kind = "int" if fmt_name.startswith(("int", "uint")) else "float"
    return {"num_bits": int(bits), "type": kind}


def _weight_args(scheme: Scheme) -> Json:
    rows, width = scheme.blocks[0]
    args = _number(scheme.weight.name, scheme.weight.bits)
    args |= {"symmetric": scheme.zero == "none", "dynamic": False}
    if len(scheme.blocks) == 2:
        return args | {"strategy": "tensor_group", "group_size": width, "scale_dtype": "torch.float8_e4m3fn"}
    if scheme.scales[0].name == "e8m0":
        return args | {"strategy": "group", "group_size": width, "scale_dtype": "torch.uint8"}
    if rows == 0:
        return args | {"strategy": "tensor"}
    if rows > 1:
        return args | {"strategy": "block", "block_structure": [rows, width]}
    if width == 0:
        return args | {"strategy": "channel"}
    order: Json = {"actorder": "group"} if scheme.reordered else {}
    return args | {"strategy": "group", "group_size": width} | order


def _input_args(activation: ActivationScheme | None) -> Json | None:
    """``input_activations``; KeyError where there are none for it."""
    if activation is None:
        return None
    args = _number(activation.number_format.name, activation.number_format.bits)
    args |= {"symmetric": activation.symmetric, "dynamic": activation.mode == "dynamic"}
    if activation.mode == "static":
        return args | {"strategy": {(0, 0): "tensor"}[activation.block]}
    if activation.scale.name == "e4m3":
        size: Json = {"group_size": activation.block[1], "scale_dtype": "torch.float8_e4m3fn"}
        return args | {"strategy": "tensor_group", "dynamic": "local"} | size
    if activation.block in ((1, 0), (0, 0)):
        return args | {"strategy": "token" if activation.block[0] else "tensor"}
    if activation.block[0] != 1:
        raise KeyError(activation.block)
    mx: Json = {"scale_dtype": "torch.uint8"} if activation.scale.name == "e8m0" else {}
    return args | {"strategy": "group", "group_size": activation.block[1]} | mx


def _codes(weight: QuantizedTensor, layout: str) -> dict[str, Tensor]:
    codes = weight.codes
    if weight.column_order is not None:  # the columns lie in their own order, g_idx says their groups
        codes = torch.empty_like(codes)
        codes[:, weight.column_order] = weight.codes
    if layout == "int-quantized":
        return {"weight": (codes ^ 0x80).view(torch.int8)}
    if weight.scheme.weight.name == "e4m3":
        return {"weight": codes.view(torch.float8_e4m3fn)}
    if layout == "pack-quantized":
        packed = pack_words(codes, int(weight.scheme.weight.bits))
        packed = packed[:, : -(-codes.shape[1] * int(weight.scheme.weight.bits) // 32)]
        return {"weight_packed": packed, "weight_shape": torch.tensor(codes.shape, dtype=torch.int64)}
    return {"weight_packed": pack_bits(codes, int(weight.scheme.weight.bits))}


def _zeros(weight: QuantizedTensor, layout: str) -> Tensor:
    zeros, bits = weight.zeros, int(weight.scheme.weight.bits)
    assert zeros is not None, "asked for those with zero points"
    if layout == "pack-quantized" and weight.scheme.blocks[0][0]:
        words = -(-zeros.shape[0] * bits // 32)
        return pack_words(zeros.to(torch.uint8), bits, dim=0)[:words]
    signed = zeros.to(torch.int16) - (1 << bits - 1)
    return signed.to(torch.int8).reshape(1) if weight.scheme.blocks[0][0] == 0 else signed.to(torch.int8)


def reciprocal(scale: Tensor, form: str, module: StoredModule) -> Tensor:
    """float32 (1,) whose float32 reciprocal is ``scale``; E0450 where there is none."""
    wanted = scale.float().reshape(1)
    near = 1.0 / wanted
    for candidate in (near, near.nextafter(torch.zeros(1)), near.nextafter(torch.full((1,), torch.inf))):
        if torch.equal(1.0 / candidate, wanted):
            return candidate
    raise cannot(form, module, f"the outer scale {float(wanted):.9g} is the reciprocal of no float32")


WRITERS = (CompressedTensorsWriter,)
