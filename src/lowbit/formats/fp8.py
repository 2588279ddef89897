"""FP8 checkpoints: DeepSeek V3/R1 and Qwen (128 x 128 blocks), AutoFP8 and vLLM (per tensor), fbgemm, MXFP8.

    weight            F8_E4M3 [out, in]
    weight_scale_inv  F32 [ceil(out / 128), ceil(in / 128)], or weight_scale, one number or one a row
    input_scale       F32, one number, where ``activation_scheme`` is static

weight[r, c] = code[r, c] * scale[block of (r, c)]: "inv" is the inverse of the *quantization* scale, it
multiplies. Blocks at the edges are short. Scales may be BF16, F16 or powers of two (E8M0, or U8 exponents).
A module whose weight is a plain matrix was left alone, whatever lies beside it: transformers writes a
scale beside matrices it could not tile. fp4 experts of newer DeepSeek models (two e2m1 codes a byte, even
column low, a scale for 32 columns) are told by their dtype. Stacked experts keep their scales stacked too,
and transformers stacks the scales of experts it saves one by one.

Inputs: dynamic per token, or per group of columns beside blocks; static per tensor. ue8m0 configs round input
scales up to powers of two; fbgemm bounds them. Per-tensor dynamic scales are taken per token here, so that a
result does not depend on batch mates.

GPTQModel's scales divide, and inputs are left as they are, as its own layers leave them (but on a GPU, where
those of one scale for the tensor round a batch's inputs under one more).
Sources: DeepSeek-V3 (2024), transformers' FineGrainedFP8, AutoFP8, fbgemm_gpu.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import InputRule, Notes, StoredModule, check_shape, finite_scales
from lowbit.formats.dense import is_dense, of_expert, origin_of
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, quantization_config
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_METHODS = ("fp8", "fbgemm_fp8", "mxfp8", "fp8_e4m3")
CODES = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
SCALES = {"F32": "f32", "BF16": "bf16", "F16": "f16", "F8_E8M0": "e8m0", "U8": "e8m0"}
_PACKED_FP4 = ("I8", "U8", "F4")
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "weight_scales_inv", "scale", "qscale_weight")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")
_INPUT_SCALES = ("input_scale", "activation_scale", "act_scale", "qscale_act")


@dataclass(frozen=True)
class _Scale:
    """Where a module's scales are. ``shape``: of the module's own; ``expert``: its slice of a stack;
    ``first``: its first row there, where gate and up share one."""

    entry: TensorEntry
    shape: tuple[int, ...]
    expert: int | None = None
    first: int | None = None

    def cut(self, stored: Tensor) -> Tensor:
        """The module's own part."""
        if self.expert is not None:
            stored = stored[self.expert]
        return stored if self.first is None else stored[self.first : self.first + self.shape[0]]


class Fp8(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "fp8"
    aliases: tuple[str, ...] = ("fbgemm_fp8", "mxfp8")
    reference: ClassVar[str] = "transformers"
    methods: tuple[str, ...] = _METHODS
    packed_codes = "e2m1"  # of 4-bit weights beside the FP8 ones
    packed_block = (1, 32)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.method, self.place = found.method.lower(), found.place
        values = found.values
        self.block = block_size(values, self.place)
        self.aliases = (self.method, "mxfp8") if self.block == (1, 32) else (self.method,)
        kind = values.get("activation_scheme", "dynamic")
        if kind not in ("static", "dynamic", None):
            raise LowbitError(
                "E0212",
                f"{self.place}.activation_scheme must be static or dynamic, found {printable(repr(kind))}",
            )
        self.static = kind == "static"
        # GPTQModel's "inverse": the stored scale divides.
        semantics = values.get("weight_scale_semantics")
        if semantics not in (None, "inverse"):
            raise LowbitError(
                "E0212",
                f"{self.place}.weight_scale_semantics must be 'inverse', found {printable(repr(semantics))}",
            )
        self.divides = semantics == "inverse"
        self.ue8m0 = values.get("scale_fmt") == "ue8m0"
        bound = values.get("activation_scale_ub", 0.0) if self.method == "fbgemm_fp8" else 0.0
        self.upper_bound = (
            float(bound) if isinstance(bound, int | float) and not isinstance(bound, bool) else 0.0
        )
        if self.upper_bound >= torch.finfo(torch.float32).max:  # no number is larger
            self.upper_bound = 0.0
        fmt = values.get("fmt", "e4m3")
        if fmt not in ("e4m3", "e5m2", "float8_e4m3fn", None):
            raise LowbitError("E0212", f"{self.place}.fmt must be e4m3 or e5m2, found {printable(repr(fmt))}")
        quantized = next(
            (e for e in header.tensors.values() if e.dtype in CODES or e.dtype in _PACKED_FP4), None
        )
        if quantized is None:
            raise LowbitError(
                "E0213",
                f"{header.root.name}: {self.place} says {found.method} but no tensor is F8; if the model was "
                "dequantized, remove the quantization config (lowbit check MODEL --fix OUT)",
            )

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method fp8, fbgemm_fp8 or mxfp8; not Quark's dress of it."""
        found = quantization_config(header)
        if found is None or found.method.lower() not in cls.methods or "export" in found.values:
            return None
        return f"{found.place} says {found.method}"

    def describe(self) -> str:
        """The block and how inputs are scaled."""
        block = f"blocks {self.block[0]}x{self.block[1]}" if self.block else "per tensor or channel"
        inputs = "plain" if self.divides else "static" if self.static else "dynamic"
        return f"{self.method}, {block}, {inputs} inputs in {self.place.split(':')[0]}"

    def _is_dense(self, module: StoredModule) -> bool:
        return is_dense(self.header, module)

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the shapes of weight and scale."""
        weight, scale, packed = self._entries(module)
        codes = self.packed_codes if packed else CODES[weight.dtype]
        block = self._block(module, scale, packed)
        return Scheme(
            number_format(codes),
            (block,),
            (number_format("f32" if self.divides else SCALES[scale.entry.dtype]),),
            activation=self._activation(block, packed),
        )

    def _tensors(self, module: StoredModule) -> list[str]:
        return [module.tensor("weight")]

    def _beside(self, module: StoredModule) -> list[str]:
        """The scales; beside a plain weight they have no meaning."""
        present = [module.tensor(suffix) for suffix in (*_WEIGHT_SCALES, *_INPUT_SCALES)]
        if (scale := self._scale_of(module)) is not None:
            present.append(scale.entry.name)
        return [name for name in dict.fromkeys(present) if name in self.header.tensors]

    def _check_plain(self, module: StoredModule) -> None:
        """A plain weight stands for itself."""
        scale = self._scale_of(module)
        if scale is not None:
            self.notes.contradiction(
                "E0214",
                f"{scale.entry.file.name}: tensor {scale.entry.name!r} lies beside a weight of plain "
                "floats; reading the weight as it is, without it",
            )

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """The bytes as codes, the scales as they are."""
        weight, scale, packed = self._entries(module)
        scheme = self._scheme(module)
        stored = of_expert(module, data.tensor(weight.name)).view(torch.uint8)
        codes = stored
        if packed:
            codes = self._unpacked(stored, module.shape[1])
        scales = scale.cut(data.tensor(scale.entry.name))
        if scale.entry.dtype == "U8":
            scales = scales.view(torch.float8_e8m0fnu)
        finite_scales(self.header, scale.entry.name, scales)
        if self.divides:
            scales = finite_scales(self.header, scale.entry.name, 1.0 / scales.float())
        return QuantizedTensor(
            scheme,
            module.shape,
            codes,
            (scales.reshape(_grid(module.shape, scheme.blocks[0])),),
            origin=origin_of(self.header, module),
        )

    def _entries(self, module: StoredModule) -> tuple[TensorEntry, _Scale, bool]:
        """(weight, its scale, whether it is packed fp4), dtypes and shapes checked."""
        name, tensors = module.tensor("weight"), self.header.tensors
        weight = tensors.get(name)
        if weight is None:
            raise LowbitError("E0209", f"{self.header.root.name}: no file contains {name!r}")
        packed = weight.dtype in _PACKED_FP4
        if weight.dtype not in CODES and not packed:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {name!r} is {weight.dtype} {list(weight.shape)}; {self.method} "
                "stores F8_E4M3. The packing does not match the quantization config",
            )
        out, columns = module.shape
        inner = (out, columns // 2 if packed else columns)
        what = f"{self.method} with input {columns}"
        check_shape(weight, inner if module.expert is None else (module.experts, *inner), what)
        scale = self._scale_of(module)
        if scale is None:
            raise LowbitError(
                "E0209",
                f"{self.header.root.name}: no file contains {module.tensor('weight_scale_inv')!r} or "
                f"{module.tensor('weight_scale')!r}, the scale of an F8 weight",
            )
        if scale.entry.dtype not in SCALES:
            raise LowbitError(
                "E0213",
                f"{scale.entry.file.name}: tensor {scale.entry.name!r} is {scale.entry.dtype}; a scale is "
                f"{' or '.join(SCALES)}",
            )
        return weight, scale, packed

    def _scale_of(self, module: StoredModule) -> _Scale | None:
        """The tensor that holds the module's scales, and which part of it they are."""
        tensors = self.header.tensors
        for suffix in _WEIGHT_SCALES:
            entry = tensors.get(module.tensor(suffix))
            if entry is not None:
                if module.expert is None:
                    return _Scale(entry, entry.shape)
                if entry.shape[:1] != (module.experts,):
                    raise self._odd_scale(module, entry)
                return _Scale(entry, entry.shape[1:], module.expert)
        # transformers saves each expert's weight by itself, and all their scales stacked and fused.
        own = _EXPERT.fullmatch(module.stored)
        if own is None:
            return None
        leaf = "down_proj" if own["leaf"] == "down_proj" else "gate_up_proj"
        entry = tensors.get(f"{own['experts']}.{leaf}_scale_inv")
        if entry is None or len(entry.shape) != 3 or int(own["number"]) >= entry.shape[0]:
            return None
        _, rows, columns = entry.shape
        if leaf == "down_proj" or rows == 1:
            return _Scale(entry, (rows, columns), int(own["number"]))
        if rows % 2:
            raise self._odd_scale(module, entry)
        first = 0 if own["leaf"] == "gate_proj" else rows // 2
        return _Scale(entry, (rows // 2, columns), int(own["number"]), first)

    def _block(self, module: StoredModule, scale: _Scale, packed: bool) -> tuple[int, int]:
        """(rows, columns) a scale covers, from its shape; the config's block first."""
        out, shape = module.shape[0], scale.shape
        count = 1
        for size in shape:
            count *= size
        if count == 1 and not (self.block and len(shape) == 2):  # a number, not a grid of one block
            return (0, 0)
        candidates = [self.block] if self.block else []
        if packed:
            candidates.insert(0, self.packed_block)
        for block in candidates:
            if shape == _grid(module.shape, block):
                return block
        if shape in ((out,), (out, 1)):
            return (1, 0)
        raise self._odd_scale(module, scale.entry)

    def _odd_scale(self, module: StoredModule, scale: TensorEntry) -> LowbitError:
        block = self.block or (128, 128)
        expected = list(_grid(module.shape, block))
        return LowbitError(
            "E0213",
            f"{scale.file.name}: tensor {scale.name!r} is {list(scale.shape)}; for weight blocks of "
            f"{block[0]} x {block[1]} a {module.shape[0]} x {module.shape[1]} weight has {expected}, per "
            f"channel [{module.shape[0]}, 1], per tensor one number ({self.place})",
        )

    def _activation(self, block: tuple[int, int], packed: bool) -> ActivationScheme | None:
        if self.divides:
            return None
        e4m3, scale = number_format("e4m3"), number_format("e8m0" if self.ue8m0 else "f32")
        if self.static:
            return ActivationScheme(e4m3, (0, 0), "static")
        if block[1]:
            return ActivationScheme(e4m3, (1, block[1]), limit=448.0, scale=scale)
        return ActivationScheme(e4m3, (1, 0), limit=448.0, upper_bound=self.upper_bound)

    def _unpacked(self, stored: Tensor, columns: int) -> Tensor:
        """uint8 (out, in) codes of a packed weight."""
        return unpack_bits(stored, 4, columns)

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        if not self.static:
            return None
        return InputRule(static_scale=self._input_scale(module, data))

    def _input_scale(self, module: StoredModule, data: TensorData) -> Tensor:
        """The one number a static config promises."""
        names = [module.tensor(suffix) for suffix in _INPUT_SCALES]
        name = next((name for name in names if name in self.header.tensors), None)
        if name is None:
            raise LowbitError(
                "E0209",
                f"{self.header.root.name}: no file contains {names[0]!r}, which activation_scheme static in "
                f"{self.place} promises",
            )
        stored = finite_scales(self.header, name, of_expert(module, data.tensor(name)))
        if stored.numel() != 1:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(name)}: tensor {name!r} is {list(stored.shape)}; a static input "
                "scale is one number",
            )
        return stored.float().reshape(())


def block_size(values: dict[str, object], place: str) -> tuple[int, int] | None:
    """``weight_block_size`` as (rows, columns), or None."""
    block = values.get("weight_block_size")
    if block is None:
        return None
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise LowbitError(
            "E0212",
            f"{place}.weight_block_size must be two positive numbers, found {printable(repr(block))}",
        )
    return sizes[0], sizes[1]


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many scales a weight (out, in) has each way; 0 in a block means the whole axis."""
    rows, columns = (size or whole for size, whole in zip(block, shape, strict=True))
    return -(-shape[0] // rows), -(-shape[1] // columns)


FORMAT = Fp8
