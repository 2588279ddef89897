"""GGUF: a type for each tensor; block types keep their mapped bytes as codes (formats.md 2.7).

Rows of Q and K are stored in the order ggml's graph of the architecture wants. Where that is adjacent
rotary pairs (llama), row 2 j + b of a head is the model's row b D/2 + j: whole rows move, block bytes and
all, nothing is quantized again. NVFP4 weights may have a sibling ``<module>.scale`` of one float, or of one
for each expert, that multiplies them; beside another type it stays unread, and loading refuses what is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
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
        if _outer_scale(header, module) is not None:
            # The outer scale makes it two levels: the blocks are taken apart.
            f32 = number_format("f32")
            return Scheme(number_format("e2m1"), ((1, 16), (0, 0)), (number_format("e4m3"), f32))
        if GGUF_TYPES_BY_NAME[entry.dtype].weights == 1:
            raise LowbitError(
                "E0219", f"{entry.file.name}: tensor {name!r} is {entry.dtype}, not a type of weights"
            )
        return Scheme(number_format(f"gguf_{entry.dtype.lower()}"))

    def tensors_of(self, header: CheckpointHeader, module: StoredModule) -> list[str]:
        """Weight, bias, and what NVFP4 has beside it. Its input scale is not applied: inputs stay 16-bit."""
        names = [f"{module.stored}.weight", f"{module.stored}.bias"]
        if _is_nvfp4(header, module):
            names += [f"{module.stored}.scale", f"{module.stored}.input_scale"]
        return [name for name in names if name in header.tensors or name == names[0]]

    def read(self, header: CheckpointHeader, module: StoredModule, data: TensorData) -> StoredLinear:
        """Mapped rows, put in the model's order."""
        name = f"{module.stored}.weight"
        scheme = self.scheme_of(header, module)
        origin = f"{header.file_of(name)}: {module.name}"
        stored = QuantizedTensor(scheme, module.shape, data.tensor(name), origin=origin)
        outer = _outer_scale(header, module)
        if outer is not None:
            stored = _with_outer_scale(stored, data.tensor(outer.name))
        bias = read_bias(header, module, data)
        if module.rotary_heads:
            order = _half_split_rows(module, header.file_of(name))
            stored = stored.permute_rows(order)
            bias = None if bias is None else bias[order]
        return StoredLinear(stored, bias)


def _half_split_rows(module: StoredModule, file: str) -> Tensor:
    """int64 (out,): where each of the model's rows lies in the file."""
    rows, heads = module.shape[-2], module.rotary_heads
    if rows % (2 * heads):
        raise LowbitError(
            "E0210",
            f"{file}: tensor '{module.stored}.weight' has {rows} rows, not {heads} heads of an even size; "
            "the file is damaged or of another kind",
        )
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(rows)


def _is_nvfp4(header: CheckpointHeader, module: StoredModule) -> bool:
    entry = header.tensors.get(f"{module.stored}.weight")
    return entry is not None and entry.dtype == "NVFP4"


def _outer_scale(header: CheckpointHeader, module: StoredModule) -> TensorEntry | None:
    """NVFP4's tensor of one float, or of one an expert; of any other type nobody knows what it means."""
    entry = header.tensors.get(f"{module.stored}.scale")
    if entry is None or not _is_nvfp4(header, module):
        return None
    expected = module.shape[:-2] or (1,)
    if entry.dtype != "F32" or entry.shape != expected:
        raise LowbitError(
            "E0210",
            f"{entry.file.name}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, the scale of "
            f"an NVFP4 weight is F32 {list(expected)}; the file is damaged or of another kind",
        )
    return entry


def _with_outer_scale(stored: QuantizedTensor, outer: Tensor) -> QuantizedTensor:
    """NVFP4 with the per-tensor scale beside it, as two levels (ModelOpt's weight_scale_2)."""
    layout = number_format("gguf_nvfp4").block
    assert layout is not None, "nvfp4 is a block format"
    parts = layout.expand(stored.codes.unflatten(-1, (-1, layout.bytes)))
    inner = parts.scales[0].flatten(-2).to(torch.float8_e4m3fn)  # exact: they were e4m3 bytes
    scales = (inner, outer.reshape(*stored.shape[:-2], 1, 1))
    return replace(stored, codes=parts.codes.flatten(-2), scales=scales)


FORMAT = Gguf()
