"""GGUF: a type for each tensor; block types keep their mapped bytes as codes (formats.md 2.7).

Rows of Q and K are stored in the order ggml's graph of the architecture wants. Where that is adjacent
rotary pairs (llama), row 2 j + b of a head is the model's row b D/2 + j: whole rows move, block bytes and
all, nothing is quantized again. NVFP4 tensors may have a sibling ``<module>.scale`` of one float.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.formats.dense import read_bias
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense

_DENSE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


class Gguf:
    """See the module docstring."""

    name = "gguf"
    reference = "ggml"

    def claims(self, header: CheckpointHeader) -> str | None:
        """Every GGUF file."""
        return "the file starts with GGUF" if header.container == "gguf" else None

    def scheme_of(self, header: CheckpointHeader, module: StoredModule) -> Scheme:
        """The tensor's type; a missing tensor or another shape is an error."""
        name = f"{module.stored}.weight"
        entry = header.tensors.get(name)
        if entry is None:
            raise LowbitError("E0209", f"{header.root.name}: no file contains {name!r}")
        if entry.shape != module.shape:
            raise LowbitError(
                "E0210",
                f"{entry.file.name}: tensor {name!r} is {list(entry.shape)} but the metadata ask for "
                f"{list(module.shape)}; the file is damaged or of another kind",
            )
        if entry.dtype in _DENSE:
            return dense(_DENSE[entry.dtype])
        if f"{module.stored}.scale" in header.tensors:
            # The outer scale makes it two levels: the blocks are taken apart.
            f32 = number_format("f32")
            return Scheme(number_format("e2m1"), ((1, 16), (0, 0)), (number_format("e4m3"), f32))
        try:
            return Scheme(number_format(f"gguf_{entry.dtype.lower()}"))
        except LowbitError:
            raise LowbitError(
                "E0219", f"{entry.file.name}: tensor {name!r} is {entry.dtype}, no type of weights"
            ) from None

    def tensors_of(self, header: CheckpointHeader, module: StoredModule) -> list[str]:
        """Weight, and what there is of bias and NVFP4's outer scales."""
        further = (f"{module.stored}.{suffix}" for suffix in ("bias", "scale", "input_scale"))
        return [f"{module.stored}.weight", *(name for name in further if name in header.tensors)]

    def read(self, header: CheckpointHeader, module: StoredModule, data: TensorData) -> StoredLinear:
        """Mapped rows, put in the model's order."""
        name = f"{module.stored}.weight"
        scheme = self.scheme_of(header, module)
        origin = f"{header.file_of(name)}: {module.name}"
        stored = QuantizedTensor(scheme, module.shape, data.tensor(name), origin=origin)
        if f"{module.stored}.scale" in header.tensors:
            stored = _with_outer_scale(stored, data.tensor(f"{module.stored}.scale"))
        bias = read_bias(header, module, data)
        if module.rotary_heads:
            order = _half_split_rows(module.shape[-2], module.rotary_heads)
            stored = stored.permute_rows(order)
            bias = None if bias is None else bias[order]
        return StoredLinear(stored, bias)


def _half_split_rows(rows: int, heads: int) -> Tensor:
    """int64 (rows,): where each of the model's rows lies in the file."""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(rows)


def _with_outer_scale(stored: QuantizedTensor, outer: Tensor) -> QuantizedTensor:
    """NVFP4 with the per-tensor scale beside it, as two levels (ModelOpt's weight_scale_2)."""
    layout = number_format("gguf_nvfp4").block
    assert layout is not None, "nvfp4 is a block format"
    parts = layout.expand(stored.codes.unflatten(-1, (-1, layout.bytes)))
    inner = parts.scales[0].flatten(-2).to(torch.float8_e4m3fn)  # exact: they were e4m3 bytes
    return replace(stored, codes=parts.codes.flatten(-2), scales=(inner, outer.float().reshape(1, 1)))


FORMAT = Gguf()
