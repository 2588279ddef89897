"""Plain checkpoints: every weight an f32, f16 or bf16 matrix (out, in) called ``<module>.weight``.

Other formats use ``read_dense`` for the modules they leave unquantized.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.formats.quantization_config import quantization_config
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def dense_scheme(header: CheckpointHeader, module: StoredModule) -> Scheme:
    """The scheme of ``<stored>.weight``; a missing tensor, another shape or dtype is an error."""
    name = f"{module.stored}.weight"
    entry = header.tensors.get(name)
    if entry is None:
        raise LowbitError("E0209", f"{header.root.name}: no file contains {name!r}")
    if entry.shape != module.shape:
        raise LowbitError(
            "E0210",
            f"{entry.file.name}: tensor {name!r} is {list(entry.shape)} but the config asks for "
            f"{list(module.shape)}; config and weights are from different models",
        )
    if entry.dtype not in _DTYPES:
        raise LowbitError(
            "E0219",
            f"{entry.file.name}: tensor {name!r} is {entry.dtype}, a plain weight is F32, F16 or BF16; "
            "config.json does not say how it is quantized",
        )
    return dense(_DTYPES[entry.dtype])


def dense_tensors(header: CheckpointHeader, module: StoredModule) -> list[str]:
    """Weight, and bias where there is one."""
    names = [f"{module.stored}.weight"]
    bias = f"{module.stored}.bias"
    return [*names, bias] if bias in header.tensors else names


def read_bias(header: CheckpointHeader, module: StoredModule, data: TensorData) -> Tensor | None:
    """The bias (out,) or None."""
    name = f"{module.stored}.bias"
    entry = header.tensors.get(name)
    if entry is None:
        return None
    if entry.shape != (module.shape[-2],) or entry.dtype not in _DTYPES:
        raise LowbitError(
            "E0210",
            f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, a bias of "
            f"{module.shape[-2]} floats was expected",
        )
    return data.tensor(name)


def read_dense(header: CheckpointHeader, module: StoredModule, data: TensorData) -> StoredLinear:
    """A plain weight in canonical form: ``codes`` is the mapped matrix itself."""
    scheme = dense_scheme(header, module)
    name = f"{module.stored}.weight"
    origin = f"{header.file_of(name)}: {module.name}"
    weight = QuantizedTensor(scheme, module.shape, data.tensor(name), origin=origin)
    return StoredLinear(weight, read_bias(header, module, data))


class Dense:
    """Unquantized safetensors checkpoints."""

    name = "dense"
    reference = "transformers"

    def claims(self, header: CheckpointHeader) -> str | None:
        """A safetensors checkpoint whose config names no quantization."""
        if header.container != "safetensors" or quantization_config(header) is not None:
            return None
        return "config.json names no quantization"

    def scheme_of(self, header: CheckpointHeader, module: StoredModule) -> Scheme:
        """The stored dtype."""
        return dense_scheme(header, module)

    def tensors_of(self, header: CheckpointHeader, module: StoredModule) -> list[str]:
        """Weight and bias."""
        return dense_tensors(header, module)

    def read(self, header: CheckpointHeader, module: StoredModule, data: TensorData) -> StoredLinear:
        """The mapped matrix."""
        return read_dense(header, module, data)


FORMAT = Dense()
