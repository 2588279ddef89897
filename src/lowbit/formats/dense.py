"""Plain checkpoints: every weight an f32, f16 or bf16 matrix (out, in) called ``<module>.weight``.

F64 is read as the nearest f32, the widest that layers compute in. FP8 without a scale anywhere is what a cast
of the whole model leaves (``model.to(torch.float8_e4m3fn)``): its numbers are the weights.

Other formats use ``read_dense`` and its fellows for the modules they leave unquantized. Stacked experts are
(experts, out, in). Where the family says so ``in`` comes before ``out``, in stacks and in single matrices.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import Notes, StoredLinear, StoredModule, check_shape
from lowbit.formats.quantization_config import quantization_config
from lowbit.formats.refused import refused_by_tensors
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

# Tensors only quantized checkpoints have, for files that lost their config.
_QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8, int8 or ModelOpt",
    ".SCB": "bitsandbytes int8",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    "_blocks": "MXFP4",
    "._weight_qdata": "torchao",
    ".W_q": "HQQ",
}
SCALED_8BIT = ("F8_E4M3", "F8_E5M2", "I8")
_8BIT_SCALES = (".weight_scale", ".weight_scale_inv")
DENSE_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_PLAIN = {**DENSE_DTYPES, "F64": "f32"}
_CAST = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
VECTOR_DTYPES = (*_PLAIN, *_CAST)  # what norms and biases may be: no scale goes with them


def scaled_8bit(header: CheckpointHeader) -> str | None:
    """The tensor that shows that weights are FP8 or int8 beside their scales, where no config says how.

    None where one does, or where other parts of quantized weights are there too.
    """
    if header.container == "gguf" or quantization_config(header) is not None or refused_by_tensors(header):
        return None
    shown = None
    for name, entry in header.tensors.items():
        stem, _, suffix = name.rpartition(".weight")
        if not stem or suffix:
            if name.endswith(tuple(_QUANTIZED)) and not name.endswith(_8BIT_SCALES):
                return None
        elif entry.dtype in SCALED_8BIT and any(f"{stem}{end}" in header.tensors for end in _8BIT_SCALES):
            shown = shown or name
        elif entry.dtype not in (*DENSE_DTYPES, *SCALED_8BIT):
            return None
    return None if shown is None else f"tensor {shown!r} has 8 bits and a scale"


def is_dense(header: CheckpointHeader, module: StoredModule) -> bool:
    """Whether the module's ``weight`` is there and a plain matrix of floats, as checkpoints that quantize
    others have them: F64 where codes should be is none of a tool's."""
    entry = header.tensors.get(module.tensor("weight"))
    return entry is not None and entry.dtype in DENSE_DTYPES


def dense_scheme(header: CheckpointHeader, module: StoredModule) -> Scheme:
    """The scheme of ``<stored>.weight``; a missing tensor, another shape or dtype is an error."""
    name = module.tensor("weight")
    entry = header.tensors.get(name)
    if entry is None:
        raise LowbitError("E0209", f"{header.root.name}: no file contains {name!r}")
    expected = stacked_shape(module)
    if entry.shape != expected:
        raise LowbitError(
            "E0210",
            f"{entry.file.name}: tensor {name!r} is {list(entry.shape)} but the config asks for "
            f"{list(expected)}; config and weights are from different models",
        )
    if entry.dtype not in _PLAIN:
        raise LowbitError(
            "E0219",
            f"{entry.file.name}: tensor {name!r} is {entry.dtype}, a plain weight is F32, F16 or BF16; "
            "config.json does not say how it is quantized",
        )
    return dense(_PLAIN[entry.dtype])


def stacked_shape(module: StoredModule) -> tuple[int, ...]:
    """The stored shape of a plain weight."""
    shape = module.shape[::-1] if module.transposed else module.shape
    return shape if module.expert is None else (module.experts, *shape)


def dense_tensors(header: CheckpointHeader, module: StoredModule) -> list[str]:
    """Weight, and bias where there is one."""
    return [module.tensor("weight"), *bias_tensors(header, module)]


def bias_tensors(header: CheckpointHeader, module: StoredModule) -> list[str]:
    """The bias where there is one."""
    bias = module.tensor("bias")
    return [bias] if bias in header.tensors else []


def read_bias(header: CheckpointHeader, module: StoredModule, data: TensorData) -> Tensor | None:
    """The bias (out,) or None."""
    name = module.tensor("bias")
    entry = header.tensors.get(name)
    if entry is None:
        return None
    expected = (module.shape[0],) if module.expert is None else (module.experts, module.shape[0])
    if entry.shape != expected or entry.dtype not in _PLAIN:
        raise LowbitError(
            "E0210",
            f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, a bias of "
            f"{list(expected)} floats was expected",
        )
    return _floats(of_expert(module, data.tensor(name)))


def _floats(stored: Tensor) -> Tensor:
    return stored.float() if stored.dtype is torch.float64 else stored


def of_expert(module: StoredModule, stored: Tensor) -> Tensor:
    """The module's own slice of a stacked tensor; any other tensor unchanged."""
    return stored if module.expert is None else stored[module.expert]


def read_dense(header: CheckpointHeader, module: StoredModule, data: TensorData) -> StoredLinear:
    """A plain weight in canonical form: ``codes`` is the mapped matrix itself."""
    scheme = dense_scheme(header, module)
    weight = _floats(of_expert(module, data.tensor(module.tensor("weight"))))
    if module.transposed:
        weight = weight.T
    quantized = QuantizedTensor(scheme, module.shape, weight, origin=origin_of(header, module))
    return StoredLinear(quantized, read_bias(header, module, data))


def origin_of(header: CheckpointHeader, module: StoredModule, suffix: str = "weight") -> str:
    """ "file: module", for messages."""
    return f"{header.file_of(module.tensor(suffix))}: {module.name}"


class Dense:
    """Unquantized safetensors checkpoints."""

    name: ClassVar[str] = "dense"
    aliases: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar[str] = "transformers"
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        for name in header.tensors:
            method = next((method for suffix, method in _QUANTIZED.items() if name.endswith(suffix)), None)
            if method is not None:
                raise LowbitError(
                    "E0213",
                    f"{header.file_of(name)}: tensor {name!r} is part of a {method} weight but config.json "
                    "names no quantization; restore the quantization config that belongs to these weights",
                )
        self._may_be_cast = not any("scale" in name.lower() for name in header.tensors)

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """A safetensors checkpoint whose config names no method, and no tensor a refused one."""
        if header.container == "gguf" or quantization_config(header) is not None:
            return None
        if refused_by_tensors(header) is not None or scaled_8bit(header) is not None:
            return None
        return "config.json names no quantization"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """The stored dtype."""
        entry = self.header.tensors.get(module.tensor("weight"))
        if entry is None or entry.dtype not in _CAST or not self._may_be_cast or module.transposed:
            return dense_scheme(self.header, module)
        check_shape(entry, stacked_shape(module), "a weight")
        return Scheme(number_format(_CAST[entry.dtype]), ((0, 0),), (number_format("f32"),))

    def tensors_of(self, module: StoredModule) -> list[str]:
        """Weight and bias."""
        return dense_tensors(self.header, module)

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """The mapped matrix."""
        scheme = self.scheme_of(module)
        if scheme.is_dense:
            return read_dense(self.header, module, data)
        codes = of_expert(module, data.tensor(module.tensor("weight"))).view(torch.uint8)
        ones, origin = (torch.ones(1, 1),), origin_of(self.header, module)
        weight = QuantizedTensor(scheme, module.shape, codes, ones, origin=origin)
        return StoredLinear(weight, read_bias(self.header, module, data))

    def describe(self) -> str:
        """Not quantized."""
        return "not quantized"


FORMAT = Dense
