"""NVIDIA ModelOpt checkpoints: FP8, NVFP4, MX and int formats, each module told by its tensors.

    FP8        weight F8_E4M3 [out, in]     weight_scale F32 []           input_scale F32 []
    NVFP4      weight U8 [out, in / 2]      weight_scale F8_E4M3 [out, in / 16]
               weight_scale_2 F32 []        input_scale F32 []            low nibble: the even column
    int4 AWQ   weight U8 [out / 2, in]      weight_scale [out, in / g]    byte [r, c]: row 2r low, 2r+1 high
    int8       weight I8 [out, in]          weight_scale [out]
    MXFP8/4    as FP8/NVFP4 with            weight_scale U8 [out, in / 32], powers of two

weight = code * weight_scale * weight_scale_2. ``pre_quant_scale`` [in] multiplies the input first. What the
input is quantized to follows from ``quant_algo`` (of the module in ``quantized_layers``, where algorithms are
mixed); the config lives in hf_quant_config.json or, since 2025, in config.json. Refused by name: NVFP4_SVD
(a low-rank branch), NVFP4_AFFINE, W4A8_AWQ (its second scale is not documented).
"""

from __future__ import annotations

import torch

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import (
    InputRule,
    Notes,
    StoredLinear,
    StoredModule,
    check_shape,
    entry_of,
    finite_scales,
    require_tensors,
)
from lowbit.formats.dense import (
    bias_tensors,
    dense_scheme,
    dense_tensors,
    is_dense,
    of_expert,
    origin_of,
    read_bias,
    read_dense,
)
from lowbit.formats.matching import spellings
from lowbit.formats.quantization_config import quantization_config
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# What an algorithm asks of the input: (number format, block, static where input_scale is there, scale).
_INPUTS: dict[str, tuple[str, tuple[int, int], bool, str] | None] = {
    "FP8": ("e4m3", (1, 0), True, "f32"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("e4m3", (1, 0), False, "f32"),
    "FP8_PB_WO": None,
    "FP8_PB_REAL": None,
    "NVFP4": ("e2m1", (1, 16), False, "e4m3"),
    "NVFP4_AWQ": ("e2m1", (1, 16), False, "e4m3"),
    "W4A16_NVFP4": None,
    "W4A8_NVFP4_FP8": ("e4m3", (1, 0), True, "f32"),
    "W4A8_MXFP4_FP8": ("e4m3", (1, 0), True, "f32"),
    "MXFP4": ("e2m1", (1, 32), False, "e8m0"),
    "MXFP8": ("e4m3", (1, 32), False, "e8m0"),
    "W4A16_AWQ": None,
    "W8A8_SQ_PER_CHANNEL": ("int8", (1, 0), True, "f32"),
    "W8A16": None,
}
_REFUSED = {
    "NVFP4_SVD": "keeps a low-rank branch beside each weight",
    "NVFP4_AFFINE": "has a KV cache with zero points",
    "W4A8_AWQ": "has a second scale nobody documents",
}
_TENSORS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


class ModelOpt:
    """See the module docstring."""

    name = "modelopt"
    aliases = ("modelopt_fp8", "modelopt_fp4", "modelopt_mixed")
    reference = "nvidia-modelopt"
    unused = (r".*\.(k|v)_bmm_quantizer\._amax",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = quantization_config(header)
        assert found is not None, "claims() saw it"
        self.place = found.place
        inner = found.values.get("quantization")
        values = inner if isinstance(inner, dict) else found.values
        if values.get("quant_algo") is None:
            raise LowbitError(
                "E0212", f"{self.place} has no 'quant_algo'; what inputs are quantized to cannot be told"
            )
        self.algorithm = self._known(values.get("quant_algo"))
        layers = values.get("quantized_layers") or {}
        if not isinstance(layers, dict):
            raise LowbitError("E0212", f"{self.place}.quantized_layers must be an object")
        self.layers = {
            name: self._known(value.get("quant_algo") if isinstance(value, dict) else None)
            for name, value in layers.items()
        }
        if "AFFINE" in str(values.get("kv_cache_quant_algo")).upper():
            raise LowbitError(
                "E0218", f"{self.place}.kv_cache_quant_algo NVFP4_AFFINE {_REFUSED['NVFP4_AFFINE']}; not read"
            )
        require_tensors(header, (".weight_scale", "_weight_scale", "_scale"), self.place, "modelopt")

    def _known(self, algorithm: object) -> str | None:
        """The algorithm in capitals, or None where none is named (the tensors then say)."""
        if algorithm is None:
            return None
        name = str(algorithm).upper()
        if name in _REFUSED:
            raise LowbitError(
                "E0218", f"{self.place}: quant_algo {name} {_REFUSED[name]}; use an FP8 or NVFP4 export"
            )
        if name != "MIXED_PRECISION" and name not in _INPUTS:
            raise LowbitError(
                "E0212",
                f"{self.place}: quant_algo {printable(repr(algorithm))} is unknown; known: "
                f"{', '.join(_INPUTS)}",
            )
        return None if name == "MIXED_PRECISION" else name

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method modelopt, or hf_quant_config.json."""
        found = quantization_config(header)
        if found is None or not found.method.lower().startswith("modelopt"):
            return None
        return f"{found.place} says {found.method}"

    def describe(self) -> str:
        """The algorithm, as the config names it."""
        mixed = f"mixed over {len(self.layers)} layers" if self.layers else "told by the tensors"
        return f"modelopt, {self.algorithm or mixed} in {self.place.split(':')[0]}"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """From dtypes and shapes; the input from the algorithm."""
        if is_dense(self.header, module):
            return dense_scheme(self.header, module)
        return self._plan(module)[0]

    def tensors_of(self, module: StoredModule) -> list[str]:
        """Weight, scales and bias."""
        present = [name for s in _TENSORS if (name := module.tensor(s)) in self.header.tensors]
        if is_dense(self.header, module):
            return [*dense_tensors(self.header, module), *present]
        return [module.tensor("weight"), *present, *bias_tensors(self.header, module)]

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """Codes unpacked, both levels of scales."""
        if is_dense(self.header, module):
            return read_dense(self.header, module, data)
        scheme, weight, grid = self._plan(module)
        stored = of_expert(module, data.tensor(weight.name))
        out, columns = module.shape
        if scheme.weight.name == "int8":
            codes = stored.view(torch.uint8) ^ 0x80
        elif scheme.weight.name == "int4":
            pairs = torch.stack((stored & 15, stored >> 4), 1)  # (out / 2, 2, in)
            codes = pairs.view(out, columns) ^ 8
        elif scheme.weight.bits == 4:
            codes = unpack_bits(stored, 4, columns)
        else:
            codes = stored.view(torch.uint8)
        scales = [self._scale(module, data, "weight_scale", scheme).reshape(grid)]
        if len(scheme.scales) == 2:
            scales.append(self._number(module, data, "weight_scale_2").reshape(1, 1))
        quantized = QuantizedTensor(
            scheme, module.shape, codes, tuple(scales), origin=origin_of(self.header, module)
        )
        bias = read_bias(self.header, module, data)
        return StoredLinear(quantized, bias, self._input(module, data, scheme))

    def _scale(self, module: StoredModule, data: TensorData, suffix: str, scheme: Scheme) -> torch.Tensor:
        name = module.tensor(suffix)
        stored = of_expert(module, data.tensor(name))
        if scheme.scales[0].name == "e8m0":
            stored = stored.view(torch.float8_e8m0fnu)
        return finite_scales(self.header, name, stored)

    def _number(self, module: StoredModule, data: TensorData, suffix: str) -> torch.Tensor:
        """float32 []: a scale of the whole tensor."""
        entry = entry_of(self.header, module, suffix, tuple(_FLOATS), "ModelOpt")
        stored = of_expert(module, data.tensor(entry.name))
        if stored.numel() != 1:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {entry.name!r} is {list(entry.shape)}; it must be one number",
            )
        return finite_scales(self.header, entry.name, stored).float().reshape(())

    def _plan(self, module: StoredModule) -> tuple[Scheme, TensorEntry, tuple[int, int]]:
        """(scheme, the weight's entry, the shape of its inner scales), everything checked."""
        out, columns = module.shape
        weight = entry_of(self.header, module, "weight", ("F8_E4M3", "U8", "I8"), "ModelOpt")
        lead = () if module.expert is None else (module.experts,)
        scale = entry_of(
            self.header, module, "weight_scale", (*_FLOATS, "F8_E4M3", "F8_E8M0", "U8"), "ModelOpt"
        )
        shape = tuple(size for size in scale.shape[len(lead) :])
        inner = weight.shape[len(lead) :]
        if weight.shape[: len(lead)] != lead:
            check_shape(weight, (*lead, out, columns), "ModelOpt")
        second: tuple[int, int] | None = None
        if weight.dtype == "U8" and inner == (out // 2, columns) and scale.dtype in _FLOATS:
            code, block = "int4", (1, self._group(module, scale, shape))
        elif weight.dtype == "U8":
            check_shape(weight, (*lead, out, columns // 2), "ModelOpt with 4-bit floats")
            code = "e2m1"
            block = (1, 16) if scale.dtype == "F8_E4M3" else (1, 32)
            if module.tensor("weight_scale_2") in self.header.tensors:
                second = (0, 0)
        else:
            check_shape(weight, (*lead, out, columns), "ModelOpt")
            code = "e4m3" if weight.dtype == "F8_E4M3" else "int8"
            block = self._block(module, scale, shape)
        fmt = "e8m0" if scale.dtype in ("U8", "F8_E8M0") else {"F8_E4M3": "e4m3", **_FLOATS}[scale.dtype]
        rows, width = block
        grid = (-(-out // (rows or out)), -(-columns // (width or columns)))
        # Axes of one come and go between versions; nothing else may differ.
        if [size for size in shape if size != 1] != [size for size in grid if size != 1]:
            check_shape(scale, (*lead, *grid), "ModelOpt")
        blocks, scales = (block,), (number_format(fmt),)
        if second is not None:
            blocks, scales = (block, second), (*scales, number_format("f32"))  # type: ignore[assignment]
        return Scheme(number_format(code), blocks, scales, activation=self._activation(module)), weight, grid

    def _group(self, module: StoredModule, scale: TensorEntry, shape: tuple[int, ...]) -> int:
        columns = module.shape[1]
        groups = shape[1] if len(shape) == 2 else 1
        if groups < 1 or columns % groups:
            check_shape(scale, (module.shape[0], -(-columns // 128)), "ModelOpt int4 with groups of 128")
        return 0 if groups == 1 else columns // groups

    def _block(self, module: StoredModule, scale: TensorEntry, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, columns) one scale covers, from its shape without axes of one."""
        out, columns = module.shape
        sizes = tuple(size for size in shape if size != 1)
        if not sizes:
            return (0, 0)
        if scale.dtype in ("U8", "F8_E8M0"):
            return (1, 32)
        if sizes == (out,):
            return (1, 0)
        grid = (-(-out // 128), -(-columns // 128))
        if sizes == tuple(size for size in grid if size != 1):
            return (128, 128)
        check_shape(scale, grid, "ModelOpt with blocks of 128 x 128")
        raise AssertionError("check_shape raised")

    def _algorithm_of(self, module: StoredModule) -> str | None:
        for name in spellings(module.stored):
            if name in self.layers:
                return self.layers[name]
        return self.algorithm

    def _activation(self, module: StoredModule) -> ActivationScheme | None:
        algorithm = self._algorithm_of(module)
        has_input_scale = module.tensor("input_scale") in self.header.tensors
        if algorithm is None:
            # Only the tensors speak: an input scale is written exactly where inputs are quantized.
            weight = self.header.tensors[module.tensor("weight")]
            algorithm = "FP8" if weight.dtype == "F8_E4M3" else "NVFP4" if weight.dtype == "U8" else "W8A16"
            if not has_input_scale:
                return None
        asked = _INPUTS[algorithm]
        if asked is None:
            return None
        name, block, static, scale = asked
        limit = {"int8": 127.0, "e4m3": 448.0}.get(name, 0.0) if scale == "f32" else 0.0
        if static and has_input_scale:
            return ActivationScheme(number_format(name), (0, 0), "static", limit=limit)
        return ActivationScheme(number_format(name), block, limit=limit, scale=number_format(scale))

    def _input(self, module: StoredModule, data: TensorData, scheme: Scheme) -> InputRule | None:
        multiplier = static = None
        name = module.tensor("pre_quant_scale")
        if name in self.header.tensors:
            entry = entry_of(self.header, module, "pre_quant_scale", tuple(_FLOATS), "ModelOpt")
            multiplier = of_expert(module, data.tensor(name)).flatten()
            if multiplier.numel() != module.shape[1]:
                check_shape(entry, (module.shape[1],), "ModelOpt")
            finite_scales(self.header, name, multiplier)
        activation = scheme.activation
        uses_static = activation is not None and (activation.mode == "static" or activation.block == (1, 16))
        if uses_static and module.tensor("input_scale") in self.header.tensors:
            static = self._number(module, data, "input_scale")
        if multiplier is None and static is None:
            return None
        return InputRule(multiplier, static)


FORMAT = ModelOpt
