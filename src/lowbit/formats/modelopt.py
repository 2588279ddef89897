"""NVIDIA ModelOpt checkpoints: FP8, NVFP4, MX and int formats; each module is told by its tensors' dtypes.

    kind   weight                  weight_scale                           beside them
    fp8    F8_E4M3 [out, in]       F32 [], [out], [out / 128, 1, in / 128, 1]    input_scale F32 []
    nvfp4  U8 [out, in / 2]        F8_E4M3 [out, in / 16] (W4A8: / 32)    weight_scale_2, input_scale F32 []
    mxfp8  F8_E4M3 [out, in]       U8 [out, in / 32], 2^(byte - 127)
    mxfp4  U8 [out, in / 2]        U8 [out, in / 32]
    int4   U8 [out / 2, in]        F32 [out, in / g]                      W4A8: weight_scale_2, input_scale
    int8   I8 [out, in]            F32 [out]                              input_scale

4-bit floats pack columns (low nibble: the even one), int4 packs rows (byte [r, c]: row 2 r low, 2 r + 1
high, two's complement). weight = code * weight_scale, in nvfp4 also * weight_scale_2. W4A8_AWQ's
weight_scale_2 is no factor: the tool's simulation rounds code * weight_scale to e4m3 under it once more,
which is not done here.
``pre_quant_scale`` [in] multiplies the input first. gpt-oss' stacked experts lie as (experts, in, out) and
call their scales ``<weight>_weight_scale``.

What inputs are quantized to follows from ``quant_algo``, of the module or the block of experts above it in
``quantized_layers`` where algorithms are mixed. The config is hf_quant_config.json or, since 2025,
config.json. MX scales of inputs round up, so that nothing saturates. NVFP4 without input_scale leaves inputs
as they are. So does MXFP4, with a warning: the tool writes that word for weights alone (gpt-oss) and for
inputs in MXFP4 too, and no other; TensorRT-LLM's W4A16_MXFP4 and W4A8_MXFP4_MXFP8 say which. Where config
and tensors disagree on the kind, or plain weights lie beside scales, the tensors win, with a warning;
another group_size than the tensors' is an error. Without quant_algo, beside a quantized KV cache, only the
cache was quantized. Refused by name: NVFP4_SVD (a low-rank branch), NVFP4_AFFINE caches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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
from lowbit.formats.dense import is_dense, of_expert, origin_of
from lowbit.formats.matching import Keys, sole_wildcard, spellings, strings, wildcard
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, quantization_config
from lowbit.numerics.bit_packing import unpack_bits
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_log = logging.getLogger("lowbit")

_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_SCALES = {**_FLOATS, "F8_E4M3": "e4m3", "F8_E8M0": "e8m0", "U8": "e8m0"}
# (the weight's dtype, what its scales are) -> the kind, and its code.
_KINDS = {
    ("F8_E4M3", "float"): ("fp8", "e4m3"),
    ("F8_E4M3", "e8m0"): ("mxfp8", "e4m3"),
    ("U8", "e4m3"): ("nvfp4", "e2m1"),
    ("U8", "e8m0"): ("mxfp4", "e2m1"),
    ("U8", "float"): ("int4", "int4"),
    ("I8", "float"): ("int8", "int8"),
}
# Columns a scale may cover; int4 may have any number.
_GROUPS: dict[str, tuple[int, ...]] = {"nvfp4": (16, 32), "mxfp4": (32,), "mxfp8": (32,), "int4": ()}


class _Algorithm(NamedTuple):
    """``kind`` of its weights; ``inputs``: e4m3 or int8 (static where there is input_scale, else dynamic per
    token), e4m3 per token, nvfp4, mxfp8, or nothing."""

    kind: str
    inputs: str


_ALGORITHMS = {
    "FP8": _Algorithm("fp8", "e4m3"),
    "FP8_PER_CHANNEL_PER_TOKEN": _Algorithm("fp8", "e4m3 per token"),
    "FP8_PB_WO": _Algorithm("fp8", ""),
    "FP8_PB_REAL": _Algorithm("fp8", ""),
    "NVFP4": _Algorithm("nvfp4", "nvfp4"),
    "NVFP4_AWQ": _Algorithm("nvfp4", "nvfp4"),
    "W4A16_NVFP4": _Algorithm("nvfp4", ""),
    "W4A8_NVFP4_FP8": _Algorithm("nvfp4", "e4m3"),
    "W4A8_MXFP4_FP8": _Algorithm("mxfp4", "e4m3"),
    "MXFP4": _Algorithm("mxfp4", ""),
    "W4A16_MXFP4": _Algorithm("mxfp4", ""),
    "W4A8_MXFP4_MXFP8": _Algorithm("mxfp4", "mxfp8"),
    "MXFP8": _Algorithm("mxfp8", "mxfp8"),
    "W4A16_AWQ": _Algorithm("int4", ""),
    "W4A8_AWQ": _Algorithm("int4", "e4m3"),
    "W8A8_SQ_PER_CHANNEL": _Algorithm("int8", "int8"),
    "W8A16": _Algorithm("int8", ""),
}


class _Said(NamedTuple):
    """What a config says of a module: an algorithm of ``_ALGORITHMS`` and the columns a scale covers."""

    algorithm: str | None = None  # None: only the tensors say
    group: int = 0  # 0: no word


# What inputs are quantized to where only the tensors speak: an input scale is there where they are.
_USUAL = {"fp8": "e4m3", "nvfp4": "nvfp4", "int4": "e4m3", "int8": "int8", "mxfp4": "e4m3", "mxfp8": ""}
_SVD = "keeps a low-rank branch beside each weight, which is not supported; use an FP8 or NVFP4 export"
_OTHERS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


@dataclass(frozen=True)
class _Stored:
    """How a module lies in its files, checked. ``block``: the (rows, columns) one scale covers."""

    kind: str
    code: str
    weight: TensorEntry
    scale: TensorEntry
    block: tuple[int, int]

    @property
    def scheme(self) -> Scheme:
        scale = number_format(_SCALES[self.scale.dtype])
        if self.kind == "nvfp4":
            scales = (scale, number_format("f32"))
            return Scheme(number_format(self.code), (self.block, (0, 0)), scales)
        return Scheme(number_format(self.code), (self.block,), (scale,))


class ModelOpt(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "modelopt"
    aliases: tuple[str, ...] = ("modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
    reference: ClassVar[str] = "nvidia-modelopt"
    unused: ClassVar[tuple[str, ...]] = (r".*\.(k|v)_bmm_quantizer\._amax",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.place = found.place
        inner = found.values.get("quantization")
        values = inner if isinstance(inner, dict) else found.values
        cache = [values.get(key) for key in ("kv_cache_quant_algo", "kv_cache_scheme")]
        if values.get("quant_algo") is None and not any(cache):
            raise LowbitError(
                "E0212", f"{self.place} has no 'quant_algo'; what inputs are quantized to cannot be told"
            )
        self.said = self._said(values)
        kind = _ALGORITHMS[self.said.algorithm].kind if self.said.algorithm else "mixed"
        self.aliases = (f"modelopt_{kind.replace('nvfp4', 'fp4')}",)
        layers = values.get("quantized_layers") or {}
        if not isinstance(layers, dict):
            raise LowbitError("E0212", f"{self.place}.quantized_layers must be an object")
        self.layers = {name: self._said(layer) for name, layer in layers.items()}
        if any(said.algorithm == "MXFP4" for said in (self.said, *self.layers.values())):
            _log.warning(
                "lowbit: %s says MXFP4, which does not tell whether inputs are quantized too; they are left "
                "as they are (W4A16_MXFP4 there says so)",
                self.place,
            )
        keys = ("exclude_modules", "ignore")
        excluded = [(name, True) for key in keys for name in strings(values.get(key), key, self.place)]
        self.excluded = Keys(excluded, wildcard, sole_wildcard)
        if any("AFFINE" in str(name).upper() for name in cache):
            raise LowbitError(
                "E0218",
                f"{self.place} asks for NVFP4_AFFINE, a KV cache with zero points, which is not supported; "
                "use an export with an FP8 cache, or none",
            )
        if values.get("quant_algo") is not None:
            require_tensors(header, (".weight_scale", "_weight_scale"), self.place, "modelopt")

    def _said(self, values: object) -> _Said:
        """The config's words on all modules, or on one; what is impossible is E0212."""
        values = values if isinstance(values, dict) else {}
        group = values.get("group_size") or 0
        if isinstance(group, bool) or not isinstance(group, int) or group < 0:
            raise LowbitError(
                "E0212", f"{self.place}: group_size must be a positive number, found {printable(repr(group))}"
            )
        algorithm = values.get("quant_algo")
        name = str(algorithm).upper()
        if algorithm is None or name == "MIXED_PRECISION":
            return _Said(None, group)
        if name in ("NVFP4_SVD", "NVFP4_SVDQUANT"):
            raise LowbitError("E0218", f"{self.place}: quant_algo {name} {_SVD}")
        if name not in _ALGORITHMS:
            raise LowbitError(
                "E0212",
                f"{self.place}: quant_algo {printable(repr(algorithm))} is unknown; known: "
                f"{', '.join(_ALGORITHMS)}",
            )
        return _Said(name, group)

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
        return f"modelopt, {self.said.algorithm or mixed} in {self.place.split(':')[0]}"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """As always; what speaks against a plain weight is said before anything is read."""
        if self._is_dense(module):
            self._check_plain(module)
        return super().scheme_of(module)

    def _is_dense(self, module: StoredModule) -> bool:
        return is_dense(self.header, module)

    def _scheme(self, module: StoredModule) -> Scheme:
        """From dtypes and shapes; the input from the algorithm."""
        return self._with_inputs(module, self._stored(module))

    def _tensors(self, module: StoredModule) -> list[str]:
        return [module.tensor("weight")]

    def _beside(self, module: StoredModule) -> list[str]:
        """The scales of the weight and of its inputs."""
        return [name for s in _OTHERS if (name := _tensor(module, s)) in self.header.tensors]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes unpacked, both levels of scales."""
        stored = self._stored(module)
        scales = [self._scale(module, data, stored)]
        if stored.kind == "nvfp4":
            scales.append(self._number(module, data, "weight_scale_2").reshape(1, 1))
        return QuantizedTensor(
            self._with_inputs(module, stored),
            module.shape,
            _codes(stored.kind, _upright(module, data.tensor(stored.weight.name)), module.shape),
            tuple(scales),
            origin=origin_of(self.header, module),
        )

    def _check_plain(self, module: StoredModule) -> None:
        """A plain weight stands for itself; one that was made for a scaled input does not."""
        left = self._beside(module)
        if not left:
            return
        where = f"{self.header.file_of(left[0])}: tensor {left[0]!r} lies beside a weight of plain floats"
        if _tensor(module, "pre_quant_scale") in left:
            raise LowbitError(
                "E0213",
                f"{where}, which may or may not be divided by pre_quant_scale; use the original export",
            )
        self.notes.contradiction("E0214", f"{where}; reading the weight as it is, without it")

    def _stored(self, module: StoredModule) -> _Stored:
        """Dtypes and shapes, checked."""
        weight = entry_of(self.header, module, "weight", ("F8_E4M3", "U8", "I8"), "ModelOpt")
        scale = self._entry(module, "weight_scale", tuple(_SCALES))
        family = "float" if scale.dtype in _FLOATS else _SCALES[scale.dtype]
        if (weight.dtype, family) not in _KINDS:
            raise LowbitError(
                "E0213",
                f"{scale.file.name}: tensor {scale.name!r} is {scale.dtype} beside a weight of "
                f"{weight.dtype}; ModelOpt stores no such pair. The packing does not match the quantization "
                "config",
            )
        kind, code = _KINDS[weight.dtype, family]
        self._refuse_unknown(module, weight, kind)
        out, columns = module.shape
        if (kind == "int4" and out % 2) or (code == "e2m1" and columns % 2):
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} of a {out} x {columns} layer is {kind}, "
                "two codes to a byte; config and weights are from different models",
            )
        packed = {"int4": (out // 2, columns), "e2m1": (out, columns // 2)}.get(code, (out, columns))
        check_shape(weight, _as_stored(module, packed), f"ModelOpt with {kind}")
        if kind in _GROUPS:
            return _Stored(kind, code, weight, scale, (1, self._group(module, scale, kind)))
        return _Stored(kind, code, weight, scale, self._block(module, scale, kind))

    def _refuse_unknown(self, module: StoredModule, weight: TensorEntry, kind: str) -> None:
        """What has tensors of a meaning that is not read here."""
        if module.expert is not None and kind not in ("fp8", "nvfp4"):
            raise LowbitError(
                "E0218",
                f"{weight.file.name}: tensor {weight.name!r}: stacked experts in {kind} have groups "
                "across outputs, which is not supported; use an FP8 or NVFP4 export",
            )
        if f"{module.stored}.svdquant_lora_a" in self.header.tensors:
            raise LowbitError("E0218", f"{weight.file.name}: {module.stored!r} {_SVD}")
        second = _tensor(module, "weight_scale_2")
        if kind not in ("nvfp4", "int4") and second in self.header.tensors:
            raise LowbitError(
                "E0213",
                f"{self.header.file_of(second)}: tensor {second!r} lies beside {kind} weights, which have "
                "one scale; the packing does not match the quantization config",
            )
        if kind == "nvfp4":
            self._entry(module, "weight_scale_2", tuple(_FLOATS))

    def _group(self, module: StoredModule, scale: TensorEntry, kind: str) -> int:
        """Columns under one scale, 0 for all: as many as the scales' shape says."""
        out, columns = module.shape
        across = scale.shape[-2 if module.transposed and module.expert is not None else -1 :][:1]
        groups = across[0] if across else 0
        usual = (_GROUPS[kind] or (128,))[0]
        if not groups or columns % groups or (_GROUPS[kind] and columns // groups not in _GROUPS[kind]):
            groups = -(-columns // usual)
        check_shape(scale, _as_stored(module, (out, groups)), f"ModelOpt with {kind}")
        return columns // groups if groups > 1 or _GROUPS[kind] else 0

    def _block(self, module: StoredModule, scale: TensorEntry, kind: str) -> tuple[int, int]:
        """(rows, columns) under one scale of an fp8 or int8 weight."""
        out, columns = module.shape
        shape = scale.shape
        if module.expert is not None and shape[:1] == (module.experts,):
            shape = shape[1:]
        if all(size == 1 for size in shape):
            return (0, 0)
        if shape in ((out,), (out, 1)):
            return (1, 0)
        a, b = -(-out // 128), -(-columns // 128)
        if kind == "fp8" and module.expert is None and shape in ((a, b), (a, 1, b, 1)):
            return (128, 128)
        blocks = f", or {[a, 1, b, 1]} for blocks of 128 x 128" if kind == "fp8" else ""
        raise LowbitError(
            "E0213",
            f"{scale.file.name}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}; ModelOpt stores "
            f"one scale, {[out]}{blocks}. The packing does not match the quantization config",
        )

    def _scale(self, module: StoredModule, data: TensorData, stored: _Stored) -> Tensor:
        """The inner scales as (rows of blocks, columns of blocks)."""
        name = stored.scale.name
        scale = data.tensor(name)
        if stored.kind in _GROUPS:
            scale = _upright(module, scale)
        elif module.expert is not None and scale.shape[:1] == (module.experts,):
            scale = scale[module.expert]
        if _SCALES[stored.scale.dtype] == "e8m0":
            scale = scale.view(torch.float8_e8m0fnu)
        rows, columns = stored.block
        out, width = module.shape
        grid = (-(-out // (rows or out)), -(-width // (columns or width)))
        return finite_scales(self.header, name, scale.reshape(grid))

    def _entry(self, module: StoredModule, suffix: str, dtypes: tuple[str, ...]) -> TensorEntry:
        return entry_of(self.header, module, _suffix(module, suffix), dtypes, "ModelOpt")

    def _number(self, module: StoredModule, data: TensorData, suffix: str) -> Tensor:
        """float32 []: a scale of the whole tensor, or of each expert."""
        entry = self._entry(module, suffix, tuple(_FLOATS))
        stored = data.tensor(entry.name).flatten()
        if module.expert is not None and stored.numel() == module.experts:
            stored = stored[module.expert : module.expert + 1]
        if stored.numel() != 1:
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: tensor {entry.name!r} is {list(entry.shape)}; it must be one number",
            )
        return finite_scales(self.header, entry.name, stored).float().reshape(())

    def _with_inputs(self, module: StoredModule, stored: _Stored) -> Scheme:
        """The weight's scheme with what its input is quantized to."""
        weight = stored.scheme
        activation = self._activation(module, stored)
        return Scheme(weight.weight, weight.blocks, weight.scales, activation=activation)

    def _activation(self, module: StoredModule, stored: _Stored) -> ActivationScheme | None:
        has_scale = _tensor(module, "input_scale") in self.header.tensors
        inputs = self._inputs(module, stored, has_scale)
        if inputs == "nvfp4" and has_scale:
            return ActivationScheme(number_format("e2m1"), (1, 16), scale=number_format("e4m3"))
        if inputs == "mxfp8":
            return ActivationScheme(number_format("e4m3"), (1, 32), limit=448.0, scale=number_format("e8m0"))
        if inputs in ("e4m3", "e4m3 per token", "int8"):
            code, limit = ("int8", 127.0) if inputs == "int8" else ("e4m3", 448.0)
            if has_scale and inputs != "e4m3 per token":
                return ActivationScheme(number_format(code), (0, 0), "static", limit=limit)
            return ActivationScheme(number_format(code), (1, 0), limit=limit)
        return None

    def _inputs(self, module: StoredModule, stored: _Stored, has_scale: bool) -> str:
        """What the config asks of the module's input; where it contradicts the tensors, what they ask."""
        where = f"{stored.weight.file.name}: {module.stored!r} is stored as {stored.kind}"
        if self.excluded.first(module.stored):
            self.notes.contradiction(
                "E0214", f"{where} but {self.place} lists it as not quantized; reading it as it is stored"
            )
        said = self._said_of(module)
        name, width = said.algorithm, stored.block[1] or module.shape[1]
        if stored.kind in _GROUPS and min(said.group or width, module.shape[1]) != width:
            raise LowbitError(
                "E0213",
                f"{stored.scale.file.name}: tensor {stored.scale.name!r} {list(stored.scale.shape)} has a "
                f"scale for {width} columns but {self.place} says group_size {said.group}; config and "
                "weights are from different models",
            )
        if name is not None and _ALGORITHMS[name].kind == stored.kind:
            return _ALGORITHMS[name].inputs
        says = f"says {name}" if name is not None else "names no algorithm for it"
        self.notes.contradiction("E0214", f"{where} but {self.place} {says}; reading it as it is stored")
        return _USUAL[stored.kind] if has_scale else ""

    def _said_of(self, module: StoredModule) -> _Said:
        """Of the module itself, of the experts it is one of, or of everybody."""
        name = module.stored
        while name and self.layers:
            for spelling in spellings(name):
                if spelling in self.layers:
                    return self.layers[spelling]
            name = name.rpartition(".")[0]
        return self.said

    def _input(self, module: StoredModule, data: TensorData) -> InputRule | None:
        """What multiplies the input first, and the one scale of static inputs."""
        activation = self._activation(module, self._stored(module))
        multiplier = static = None
        name = _tensor(module, "pre_quant_scale")
        if name in self.header.tensors:
            entry = self._entry(module, "pre_quant_scale", tuple(_FLOATS))
            multiplier = data.tensor(name)
            if module.expert is not None and entry.shape[:1] == (module.experts,):
                multiplier = multiplier[module.expert]
            if multiplier.numel() != module.shape[1]:
                check_shape(entry, (module.shape[1],), "ModelOpt")
            multiplier = finite_scales(self.header, name, multiplier.flatten())
        if activation is not None and (activation.mode == "static" or activation.block == (1, 16)):
            static = self._number(module, data, "input_scale")
        if multiplier is None and static is None:
            return None
        return InputRule(multiplier, static)


def _suffix(module: StoredModule, suffix: str) -> str:
    """As ``StoredModule.tensor`` wants it: a stack's scales are called ``gate_up_proj_weight_scale``."""
    return suffix if module.expert is None else f"weight_{suffix}"


def _tensor(module: StoredModule, suffix: str) -> str:
    """The stored name of what belongs to a weight."""
    return module.tensor(_suffix(module, suffix))


def _as_stored(module: StoredModule, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape in the file of what is (rows, columns) for one module."""
    if module.expert is None:
        return shape
    return (module.experts, *(shape[::-1] if module.transposed else shape))


def _upright(module: StoredModule, stored: Tensor) -> Tensor:
    """The module's own (rows, columns)."""
    mine = of_expert(module, stored)
    return mine.T.contiguous() if module.expert is not None and module.transposed else mine


def _codes(kind: str, stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """uint8 (out, in), signed integers in offset binary."""
    if kind == "int8":
        return stored.view(torch.uint8) ^ 0x80
    if kind == "int4":
        pairs = torch.stack((stored & 15, stored >> 4), 1)  # (out / 2, 2, in)
        return pairs.view(shape) ^ 8
    if kind in ("nvfp4", "mxfp4"):
        return unpack_bits(stored, 4, shape[1])
    return stored.view(torch.uint8)


FORMAT = ModelOpt
